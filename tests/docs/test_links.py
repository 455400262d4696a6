"""Links in the pages of the repository and of the documentation: each leads to a file, and to a heading in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    page for page in DOCS.rglob("*.md") if "_build" not in page.parts
)
REPOSITORY = re.compile(r"https://github\.com/fastmaf/fastmaf/(?:blob|tree|raw)/main/(.*)")
SITE = re.compile(r"https://fastmaf\.github\.io/fastmaf/(.*)")
WRITTEN = {"api/command_line.md"}  # by docs/conf.py, when the pages are built

_FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
_TARGETS = (
    re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)"),  # [text](target), ![text](target "title")
    re.compile(r"^ {0,3}\[[^\]]+\]:\s+<?([^\s>]+)", re.MULTILINE),  # [text]: target
    re.compile(r"<(?:a|img|source|video)\b[^>]*?\b(?:href|src|srcset)=[\"']([^\"']+)", re.IGNORECASE),
)
_OPTION_LINK = re.compile(r"^ *:link: +(\S+)", re.MULTILINE)  # of sphinx-design's cards
_FIGURE = re.compile(r"^ *(?:```+|:::+) *\{(?:figure|image|include|literalinclude)\} +(\S+)", re.MULTILINE)


def targets(text: str) -> Iterator[str]:
    """Yields the targets of all links and images of a page; code is skipped, directives are not."""
    yield from _FIGURE.findall(text)
    yield from _OPTION_LINK.findall(text)
    prose = re.sub(r"(`+)[^`].*?\1", "", _FENCE.sub(_directive_only, text))
    for pattern in _TARGETS:
        yield from pattern.findall(prose)


def _directive_only(fence: re.Match[str]) -> str:
    """Returns the content of a fenced directive, such as a grid of cards; nothing for code."""
    first, _, rest = fence[0].partition("\n")
    code = not re.match(r" *(```+|~~~+) *\{(?!code|eval-rst|math|literalinclude)", first)
    return "" if code else rest.rpartition("\n")[0]


def anchors(text: str) -> set[str]:
    """Returns the anchors of a page: its headings as GitHub and MyST name them, explicit labels and ids."""
    prose = _FENCE.sub("", text)
    found = set(re.findall(r"^\(([^)\s]+)\)= *$", prose, re.MULTILINE))
    found |= set(re.findall(r"\b(?:id|name)=[\"']([^\"']+)", prose))
    count: dict[str, int] = {}
    for heading in re.findall(r"^ {0,3}#{1,6} +(.*?) *#* *$", prose, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(slug if slug not in count else f"{slug}-{count[slug]}")
        count[slug] = count.get(slug, 0) + 1
    return found


def dead(page: Path, text: str) -> list[str]:
    """Returns what is wrong with the links of a page; links to other sites are not opened."""
    return [f"{target}: {why}" for target in targets(text) if (why := _fault(page, text, unquote(target)))]


def _fault(page: Path, text: str, target: str) -> str | None:
    if match := REPOSITORY.fullmatch(target):
        path, _, anchor = match[1].partition("#")
        file = ROOT / path
    elif match := SITE.fullmatch(target):
        path, _, anchor = match[1].partition("#")
        if path.startswith("_"):  # pages that Sphinx writes
            return None
        file = DOCS / (path.removesuffix(".html") + ".md" if path.endswith(".html") else f"{path}index.md")
        anchor = ""  # Sphinx names objects, too
    elif re.match(r"[a-z][a-z0-9+.-]*:", target):
        return None
    else:
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if file.suffix == "" and not file.exists():  # MyST completes the names of pages
            file = file.with_suffix(".md")
    if DOCS in file.resolve().parents and file.resolve().relative_to(DOCS).as_posix() in WRITTEN:
        return None
    if not file.exists():
        return f"{file.relative_to(ROOT) if file.is_relative_to(ROOT) else file} does not exist"
    if anchor and file.suffix == ".md" and anchor not in anchors(text if file == page else file.read_text("utf-8")):
        return "there is no such heading"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    assert dead(page, page.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "link",
    [
        "[text](missing.md)",
        "![text](missing.png)",
        '![text](missing.png "title")',
        "[text](#no-heading)",
        "[text](CHANGELOG.md#no-heading)",
        "[text][name]\n\n[name]: missing.md",
        '<img src="missing.png">',
        '<picture><source srcset="missing.svg"></picture>',
        "[text](https://github.com/fastmaf/fastmaf/blob/main/missing.py)",
        "[text](https://github.com/fastmaf/fastmaf/blob/main/CHANGELOG.md#no-heading)",
        "[text](https://fastmaf.github.io/fastmaf/missing.html)",
        "```{figure} missing.png\n```",
        "```{note}\n[text](missing.md)\n```",
        ":::{grid-item-card} Title\n:link: missing\n:::",
    ],
)
def test_a_dead_link_is_named(link: str) -> None:
    (fault,) = dead(ROOT / "README.md", f"# A heading\n\nSee {link}.\n" if "\n" not in link else f"# H\n\n{link}\n")
    assert "missing" in fault or "no-heading" in fault


@pytest.mark.parametrize(
    "link",
    [
        "[text](CHANGELOG.md)",
        "[text](#a-heading-with-code-twice)",
        "[text](#a-heading-with-code-twice-1)",
        "[text](#label)",
        "`[text](missing.md)`",
        "\n```python\nlist[int](missing)\n```\n",
        "[text](https://example.org/missing)",
        "[text](mailto:nobody@example.org)",
        "[text](https://github.com/fastmaf/fastmaf/blob/main/fastmaf/__init__.py)",
        "[text](https://github.com/fastmaf/fastmaf/tree/main/fastmaf)",
        "[text](https://fastmaf.github.io/fastmaf/quickstart.html#anything)",
        "[text](https://fastmaf.github.io/fastmaf/)",
    ],
)
def test_a_link_that_leads_somewhere_is_not_named(link: str) -> None:
    text = f"(label)=\n# A heading with `code`, twice\n# A heading with `code`, twice\n\nSee {link}.\n"
    assert dead(ROOT / "README.md", text) == []
