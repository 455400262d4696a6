"""Sphinx configuration; ``make docs`` builds the pages with warnings as errors."""

from __future__ import annotations

from pathlib import Path

import typer

import fastmaf
from fastmaf.cli.app import app

project = "fastmaf"
author = "the fastmaf developers"
copyright = "the fastmaf developers, Apache License 2.0"
release = version = fastmaf.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_design",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["fastmaf.css"]
html_title = f"fastmaf {release}"
html_theme_options = {"top_of_page_buttons": []}

myst_enable_extensions = ["colon_fence", "dollarmath", "amsmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"  # a page of the gallery runs again after a change
nb_execution_cache_path = "../build/docs-cache"
nb_execution_timeout = 600
nb_execution_raise_on_error = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures carry the hints
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# Inventories need the network: the workflow that publishes the pages sets this tag.
if tags.has("online"):  # type: ignore[name-defined]  # noqa: F821
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "sklearn": ("https://scikit-learn.org/stable", None),
    }


_OUTPUT = """\
## Output and exit codes

Results are printed to standard output; progress, notes and errors to standard error. On a terminal, progress is a bar. In a log
it is one line per tenth of the work, and nothing for work of less than two seconds. `--quiet` shows no progress. With `--json`,
standard output holds one JSON object and nothing else.

| exit code | meaning |
| --- | --- |
| 0 | success |
| 1 | error; the line `error: ...` on standard error names the cause. `fastmaf bench`: also if a library gave wrong results; with `--compare`: also if the second run is slower |
| 2 | wrong usage: an unknown option, a value out of range, a missing file. `fastmaf inspect score`: also if files could not be read; all others were scored |
| 3 | `fastmaf inspect score --fail-on-anomaly`: an image is anomalous |
| 130 | interrupted by Ctrl-C; a training run has written a checkpoint, and `inspect score --out` a journal, which `--resume` continues |
"""  # noqa: E501


def _helps(command, context):  # type: ignore[no-untyped-def]
    """Yields the title and help of a command and, if it is a group, of its visible commands."""
    yield context.command_path, command.get_help(context)
    for name, part in getattr(command, "commands", {}).items():
        if not part.hidden:
            yield from _helps(part, type(context)(part, info_name=name, parent=context, max_content_width=84))


def _write_command_line() -> None:
    """Writes the page of the command line from the commands' own help."""
    command = typer.main.get_command(app)
    context = command.context_class(
        command, info_name="fastmaf", max_content_width=84, terminal_width=84, **command.context_settings
    )
    parts = [f"## {title}\n\n```text\n{text}\n```\n" for title, text in _helps(command, context)]
    page = Path(__file__).parent / "api" / "command_line.md"
    page.write_text("# Command line\n\n" + "\n".join([_OUTPUT, *parts]), encoding="utf-8")


_write_command_line()
