"""The commands of the pages: the command line accepts all of them, and those of the quickstart are run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from fastmaf.cli.app import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
WRITTEN = DOCS / "api" / "command_line.md"  # by docs/conf.py, from the help of the commands
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(set(DOCS.rglob("*.md")) - {WRITTEN})]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: [^\n]* -->\n```bash\n.*?^```", re.MULTILINE | re.DOTALL)


def whole_commands(text: str) -> list[str]:
    """Returns the command lines of fastmaf in the indented and fenced blocks of a page."""
    blocks = [code for language, code in _FENCE.findall(text) if language == "bash"]
    blocks += re.findall(r"(?:^    .*\n)+", _FENCE.sub("", text), re.MULTILINE)
    parts = [part.strip() for line in "".join(blocks).splitlines() for part in line.split("&&")]
    return [part for part in parts if part.startswith("fastmaf ")]


def mentioned_commands(text: str) -> list[str]:
    """Returns the command lines of fastmaf within sentences; options and arguments may be missing there."""
    return [" ".join(code.split()) for code in re.findall(r"`(fastmaf\s[^`]+)`", _FENCE.sub("", text))]


def fault(line: str, *, whole: bool) -> str | None:
    """Returns why the command line refuses a command, without running it, or None."""
    command = typer.main.get_command(app)
    context = command.context_class(command, info_name="fastmaf")
    words = shlex.split(line, comments=True)[1:]
    while words and hasattr(command, "commands"):
        if words[0].startswith("-"):
            break
        found = command.commands.get(words[0])
        if found is None or found.hidden:
            return f"{context.command_path} has no command {words[0]!r}"
        context = found.context_class(found, info_name=words.pop(0), parent=context)
        command = found
    try:
        given, rest, _ = command.make_parser(context).parse_args(words)
    except Exception as error:  # the parser's own errors, which differ between versions of typer
        return str(error)
    if rest:
        return f"{context.command_path}: unexpected {rest}"
    for parameter in command.params if whole else ():
        value = given.get(parameter.name)
        if parameter.required and not (isinstance(value, (str, list, tuple)) and value):
            return f"{context.command_path}: {parameter.name} is missing"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_command_line_accepts_every_command_of_a_page(page: Path) -> None:
    text = page.read_text("utf-8")
    faults = {line: fault(line, whole=True) for line in whole_commands(text)}
    faults |= {line: fault(line, whole=False) for line in mentioned_commands(text)}
    assert {line: why for line, why in faults.items() if why is not None} == {}


def test_the_makefile_uses_no_former_spelling() -> None:
    lines = re.findall(r'^\t"\$\(BIN\)/fastmaf" ([a-z ]+)', (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert "capsule reproduce" in map(str.strip, lines)
    assert [why for line in lines if (why := fault(f"fastmaf {line}", whole=False))] == []


@pytest.mark.parametrize(
    "line",
    [
        "fastmaf inspect fit --out results",  # --data is missing
        "fastmaf inspect recalibrate results",  # the images are missing
        "fastmaf inspect fit --data demo --outt results",
        "fastmaf inspect fit --data demo more",
        "fastmaf capsule fit --data demo",
        "fastmaf train --data demo",  # a former spelling
    ],
)
def test_what_the_command_line_refuses_is_found(line: str) -> None:
    assert fault(line, whole=True) is not None


def test_readme_shows_commands_and_the_two_targets_that_do_everything() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert {line.split()[1] for line in whole_commands(text)} >= {"capsule", "inspect", "doctor"}
    for target in ("reproduce", "test"):
        assert re.search(rf"^    make {target}( |$)", text, re.MULTILINE)
    assert len(text.splitlines()) <= 150


@pytest.mark.slow
def test_the_commands_of_the_quickstart_run_one_after_the_other(tmp_path: Path) -> None:
    text = _NOT_RUN.sub("", (DOCS / "quickstart.md").read_text("utf-8"))
    lines = [line for language, code in _FENCE.findall(text) if language == "bash" for line in code.splitlines()]
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        assert program == "fastmaf", f"mark the block as not run: {line}"
        command = [sys.executable, "-m", "fastmaf", *arguments]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, f"{line}\n{run.stdout}{run.stderr}"
    assert (tmp_path / "scores.csv").read_text("utf-8").startswith("file,score,p_value,verdict")
    assert any((tmp_path / "heat").rglob("*.png"))
    assert (tmp_path / "results" / "report.html").exists()
