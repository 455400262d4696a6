"""Help and usage errors: exit code 2 and one line for an error, before torch and other slow packages are imported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastmaf
from tests.cli.command import ROOT, Done, assert_one_error, fastmaf_process

COMMANDS = {
    "inspection": ("train", "calibrate", "recalibrate", "score", "eval", "export", "choose"),
    "capsule": ("demo-data", "train", "sample", "eval", "reproduce"),
}
SHORT = sorted({*COMMANDS["inspection"], *COMMANDS["capsule"], "bench", "doctor"})  # found without a group's name
HELP = [
    (),
    *((command,) for command in SHORT),
    *((group, command) for group in COMMANDS for command in COMMANDS[group]),
]

TRAIN = ("train", "--data", "folder")
INSPECTION = ("inspection", "train", "--data", "folder")
ERRORS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("tarin",), ("tarin",)),
    (("inspection", "sample"), ("sample",)),
    (("train",), ("--data",)),
    (("score",), ("Missing argument",)),
    (("score", "folder"), ("Missing argument",)),
    (("export", "folder"), ("--onnx",)),
    (("export", "folder", "--onnx", "m.onnx"), ("--check",)),
    (("doctor", "now"), ("now",)),
    (("bench", "--compare", "one.csv"), ("--compare", "2 arguments")),
    ((*TRAIN, "--nonsense"), ("--nonsense",)),
    ((*TRAIN, "--recipe", "cake"), ("--recipe", "cake", "inspection")),
    ((*TRAIN, "--logit", "0.1"), ("--logit",)),
    ((*TRAIN, "--recipe", "inspection", "--lr", "1"), ("--lr",)),
    ((*TRAIN, "--recipe=inspection", "--device", "cpu"), ("--device",)),
    ((*TRAIN, "--blocks", "two"), ("--blocks", "integer")),
    ((*TRAIN, "--order", "backwards"), ("--order", "backwards")),
    ((*TRAIN, "--hidden", "abc"), ("hidden layer", "512,512", "'abc'")),
    ((*TRAIN, "--hidden", "16,,16"), ("'16,,16'",)),
    ((*TRAIN, "--hidden", "0"), ("'0'",)),
    ((*TRAIN, "--holdout", "1.5"), ("holdout", "1.5")),
    ((*TRAIN, "--lr", "-1"), ("lr must be positive", "-1")),
    ((*TRAIN, "--epochs", "0"), ("--epochs",)),
    ((*TRAIN, "--levels", "0"), ("--levels",)),
    ((*TRAIN, "--device", "tpu"), ("--device", "'tpu'")),
    ((*TRAIN, "--device", "cuda:x"), ("--device", "'cuda:x'")),
    ((*TRAIN, "--seed", "-1"), ("--seed",)),
    ((*TRAIN, "--seed", str(2**70)), ("--seed",)),
    ((*INSPECTION, "--size", "7"), ("size must be a multiple", "7")),
    ((*INSPECTION, "--logit", "0.7"), ("logit", "0.7")),
    (("choose", "--data", "folder", "--size", "7"), ("size must be a multiple", "7")),
    (("choose", "--data", "folder", "--draws", "0"), ("--draws",)),
    (("demo-data", "new", "--size", "3"), ("--size",)),
    (("sample", "--model", "folder", "-n", "0"), ("--number",)),
    (("calibrate", "--model", "folder", "--false-alarm", "2"), ("--false-alarm", "between 0 and 1", "2")),
    (("calibrate", "--model", "folder", "--confidence", "nan"), ("--confidence", "nan")),
    (("eval", "--model", "folder", "--data", "folder", "--false-alarm", "0"), ("--false-alarm",)),
    (("score", "folder", "folder", "--out", "rows.txt"), (".csv or .jsonl", "rows.txt")),
    (("score", "folder", "folder", "--tiff"), ("--tiff", "--maps")),
    (("train", "--data", "nowhere"), ("--data", "no such file or folder: nowhere")),
    (("reproduce", "--data", "nowhere"), ("no such file or folder: nowhere",)),
    (("calibrate", "--model", "nowhere"), ("--model", "no such file or folder: nowhere")),
    (("eval", "--model", "nowhere", "--data", "folder"), ("--model", "nowhere")),
    (("sample",), ("--model", "no such file or folder: results")),
    (("score", "nowhere", "folder"), ("no such file or folder: nowhere",)),
    (("score", "folder", "foldr"), ("no such file or folder: foldr", "did you mean folder?")),
    (("score", "folder", "*.png"), ("nothing matches *.png",)),
    (("recalibrate", "folder", "\x1b[2J\x07.png"), (r"\x1b[2J\x07.png",)),
    (("export", "folder", "--onnx", "m.onnx", "--check", "nowhere"), ("--check", "nowhere")),
]

# Runs every command line that standard input lists in one process, which takes a second, and notes slow packages.
SCRIPT = """
import contextlib, io, json, sys
from fastmaf.cli import main

def run(arguments):
    sys.argv = ["fastmaf", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code
    slow = sorted({"torch", "scipy", "sklearn", "matplotlib", "rich"} & set(sys.modules))
    return code, out.getvalue(), err.getvalue(), slow

print(json.dumps([run(arguments) for arguments in json.load(sys.stdin)]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], tuple[Done, list[str]]]:
    """The output of each command line where there is an empty ``folder``, and the slow packages imported by then."""
    working_folder = tmp_path_factory.mktemp("usage")
    (working_folder / "folder").mkdir()
    lines = [*((*line, "--help") for line in HELP), ("--version",), *(line for line, _ in ERRORS)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(lines),
        cwd=working_folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in working_folder.iterdir()) == ["folder"], "a usage error writes nothing"
    results: list[Any] = json.loads(done.stdout)
    return {line: (Done(*done), slow) for line, (*done, slow) in zip(lines, results, strict=True)}


@pytest.mark.parametrize(("line", "words"), ERRORS, ids=[" ".join(line).encode("unicode_escape") for line, _ in ERRORS])
def test_a_usage_error(answers: Any, line: tuple[str, ...], words: tuple[str, ...]) -> None:
    done, slow = answers[line]
    assert_one_error(done, *words)
    assert (done.code, done.out, slow) == (2, "", [])
    assert not {"\x1b", "\x07"} & set(done.err)


@pytest.mark.parametrize("line", HELP, ids=" ".join)
def test_help(answers: Any, line: tuple[str, ...]) -> None:
    done, slow = answers[(*line, "--help")]
    assert (done.code, done.err, slow) == (0, "", [])
    assert done.out.startswith(f"Usage: fastmaf {'capsule ' * (line == ('train',))}{' '.join(line)}")
    if not line:
        listed = re.findall(r"^  ([a-z][a-z-]+) ", done.out.partition("Commands:")[2], re.MULTILINE)
        assert sorted(listed) == sorted([*SHORT, *COMMANDS])


def test_help_of_a_recipe_is_that_of_its_group(run: Any) -> None:
    short, full = run("train", "--recipe", "inspection", "--help"), run("inspection", "train", "--help")
    assert short.out == full.out
    assert "--keep-folds" in short.out and "--lr" not in short.out


def test_the_version(answers: Any) -> None:
    done, slow = answers["--version",]
    assert (done, slow) == ((0, f"fastmaf {fastmaf.__version__}\n", ""), [])
    assert fastmaf_process("--version").out == done.out


def test_the_package_imports_torch_with_its_first_name() -> None:
    code = (
        "import sys, fastmaf; before = 'torch' in sys.modules;"
        "from fastmaf import *; print(before, 'torch' in sys.modules, set(fastmaf.__all__) <= set(globals()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["False", "True", "True"], done.stderr


def test_an_unknown_name_of_the_package() -> None:
    with pytest.raises(AttributeError, match="'fastmaf' has no attribute 'MFA'"):
        _ = fastmaf.MFA


@pytest.mark.parametrize("path", ["-", "folder/*.png", "a [1].png"])
def test_images_that_are_there_are_no_usage_error(run: Any, tmp_path: Path, path: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("folder/1.png", "a [1].png"):
        (tmp_path / name).write_bytes(b"")
    done = run("recalibrate", "folder", path)
    assert_one_error(done, "no model file at folder")
    assert done.code == 1
