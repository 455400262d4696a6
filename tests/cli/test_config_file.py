"""Settings from TOML and JSON files: ``inspect fit --config``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastmaf.cli.config_file import read_file, resolved, to_toml
from fastmaf.inspection.recipe import Recipe
from tests.cli.command import Fastmaf


def printed(run: Fastmaf, *arguments: object) -> dict[str, object]:
    """The settings that --print-config prints, read back."""
    done = run("inspect", "fit", *arguments, "--print-config")
    assert done.code == 0, done.err
    path = Path(str(arguments[arguments.index("--config") + 1])).parent / "printed.toml"
    path.write_text(done.out, "utf-8")
    return read_file(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "good").mkdir()
    return tmp_path


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_options_take_precedence_over_the_file_and_the_file_over_defaults(
    run: Fastmaf, folder: Path, suffix: str
) -> None:
    content = {"data": str(folder / "good"), "size": 32, "rank": 50, "blocks": 0, "group-by": "folder", "logit": 0.1}
    file = folder / f"run{suffix}"
    file.write_text(to_toml(content) if suffix == ".toml" else json.dumps(content), "utf-8")
    found = printed(run, "--config", file, "--size", 16)
    expected = resolved(Recipe(size=16, rank=50, blocks=0, logit=0.1), data=str(folder / "good"), out="results")
    expected |= {"group_by": "folder", "keep_folds": False, "skip_bad": False, "budget": found["budget"]}
    expected["kind"] = "auto"
    assert found == {key: value for key, value in expected.items() if value is not None}
    assert printed(run, "--config", folder / "printed.toml") == found, "what was printed gives the same settings"


def test_texts_of_any_kind_come_back(tmp_path: Path) -> None:
    content = {"data": 'a "b" \\ c\n\t\x7f\u00e9\U0001f600', "folds": 5, "lr": 1e-05, "keep_folds": True}
    (tmp_path / "c.toml").write_text(to_toml(content), "utf-8")
    assert read_file(tmp_path / "c.toml") == content


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("c.toml", "sizze = 64", ("unknown key 'sizze'", "did you mean size?")),
        ("c.toml", "[recipe]\nsize = 64", ("unknown key 'recipe'",)),
        ("c.toml", "zzz = 1", ("unknown key 'zzz'", "expected one of", "rank")),
        ("c.toml", "json = true", ("unknown key 'json'",)),
        ("c.toml", "size = 64.5", ("expected auto or a whole number",)),
        ("c.toml", "size = true", ("size: expected a text",)),
        ("c.toml", "size = 0", ("expected auto or a whole number",)),
        ("c.toml", "folds = 2.5", ("folds: expected a whole number; found 2.5",)),
        ("c.toml", "rank = [1]", ('rank: expected "auto" or a whole number',)),
        ("c.toml", 'blocks = "many"', ('expected "auto" or a whole number',)),
        ("c.toml", "keep_folds = 1", ("true or false",)),
        ("c.toml", "folds = 1", ("folds must be at least 2",)),
        ("c.toml", "size = ", ("not valid TOML",)),
        ("c.toml", "size = 1\nsize = 2", ("not valid TOML",)),
        ("c.json", '{"size": 1, "size": 2}', ("size",)),
        ("c.json", "[1]", ("expected keys and values",)),
        ("c.yaml", "size: 64", (".toml or .json",)),
        ("c.toml", 'data = "missing"', ("no such file or folder: missing",)),
    ],
)
def test_what_is_wrong_is_named(run: Fastmaf, folder: Path, name: str, text: str, words: tuple[str, ...]) -> None:
    (folder / name).write_text(text, "utf-8")
    data = () if "data" in text else ("--data", folder / "good")
    done = run("inspect", "fit", *data, "--config", folder / name)
    assert done.code == 2 and not done.out
    error = " ".join(done.err.split())
    assert all(word in error for word in words), error


def test_a_missing_file_is_named(run: Fastmaf, folder: Path) -> None:
    done = run("inspect", "fit", "--data", folder, "--config", folder / "none.toml")
    assert done.code == 2 and "none.toml" in done.err
