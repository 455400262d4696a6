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
    "inspect": ("fit", "calibrate", "recalibrate", "score", "serve", "eval", "export", "choose"),
    "capsule": ("demo-data", "train", "sample", "eval", "reproduce"),
}
TOP = ("bench", "doctor")
HELP = [
    (),
    *((group,) for group in COMMANDS),
    *((command,) for command in TOP),
    *((group, command) for group in COMMANDS for command in COMMANDS[group]),
]
# Former spellings, with what each is now.
FORMER = {
    ("demo-data",): ("capsule", "demo-data"),
    ("train",): ("capsule", "train"),
    ("train", "--recipe", "published"): ("capsule", "train"),
    ("train", "--recipe", "inspection"): ("inspect", "fit"),
    ("train", "--recipe=inspection"): ("inspect", "fit"),
    ("sample",): ("capsule", "sample"),
    ("reproduce",): ("capsule", "reproduce"),
    ("eval",): ("capsule", "eval"),
    ("inspection", "train"): ("inspect", "fit"),
    **{(name,): ("inspect", name) for name in ("calibrate", "recalibrate", "score", "choose", "export")},
    **{
        ("inspection", name): ("inspect", name)
        for name in ("calibrate", "recalibrate", "score", "eval", "choose", "export")
    },
}

TRAIN = ("capsule", "train", "--data", "folder")
FIT = ("inspect", "fit", "--data", "folder")
ERRORS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("tarin",), ("tarin",)),
    (("inspect", "sample"), ("sample",)),
    (("capsule", "train"), ("--data",)),
    (("inspect", "score"), ("Missing argument",)),
    (("inspect", "score", "folder"), ("Missing argument",)),
    (("inspect", "export", "folder"), ("--onnx",)),
    (("inspect", "export", "folder", "--onnx", "m.onnx"), ("--check",)),
    (("doctor", "now"), ("now",)),
    (("bench", "--compare", "one.csv"), ("--compare", "2 arguments")),
    ((*TRAIN, "--nonsense"), ("--nonsense",)),
    ((*TRAIN, "--logit", "0.1"), ("--logit",)),
    ((*FIT, "--lr", "1"), ("--lr",)),
    ((*FIT, "--device", "cpu"), ("--device",)),
    ((*TRAIN, "--blocks", "two"), ("--blocks", "integer")),
    ((*TRAIN, "--order", "backwards"), ("--order", "backwards")),
    ((*TRAIN, "--hidden", "abc"), ("hidden layer", "512,512", "'abc'")),
    ((*TRAIN, "--hidden", "16,,16"), ("'16,,16'",)),
    ((*TRAIN, "--hidden", "0"), ("'0'",)),
    ((*TRAIN, "--holdout", "1.5"), ("holdout", "1.5")),
    ((*TRAIN, "--lr", "-1"), ("lr must be positive", "-1")),
    ((*TRAIN, "--epochs", "0"), ("--epochs",)),
    ((*TRAIN, "--epochs", str(2**31)), ("--epochs",)),
    ((*FIT, "--size", "100000"), ("--size",)),
    ((*TRAIN, "--levels", "0"), ("--levels",)),
    ((*TRAIN, "--device", "tpu"), ("--device", "'tpu'")),
    ((*TRAIN, "--device", "cuda:x"), ("--device", "'cuda:x'")),
    ((*TRAIN, "--seed", "-1"), ("--seed",)),
    ((*TRAIN, "--seed", str(2**70)), ("--seed",)),
    ((*FIT, "--size", "7"), ("size must be a multiple", "7")),
    ((*FIT, "--logit", "0.7"), ("logit", "0.7")),
    (("inspect", "choose", "--data", "folder", "--size", "7"), ("size must be a multiple", "7")),
    (("inspect", "choose", "--data", "folder", "--draws", "0"), ("--draws",)),
    (("capsule", "demo-data", "new", "--size", "3"), ("--size",)),
    (("capsule", "sample", "folder", "-n", "0"), ("--number",)),
    (("inspect", "calibrate", "folder", "--false-alarm", "2"), ("--false-alarm", "between 0 and 1", "2")),
    (("inspect", "calibrate", "folder", "--confidence", "nan"), ("--confidence", "nan")),
    (("capsule", "eval", "folder", "--data", "folder", "--false-alarm", "0"), ("--false-alarm",)),
    (("inspect", "eval", "folder", "--data", "folder", "--false-alarm", "0.1"), ("--false-alarm",)),
    (("inspect", "score", "folder", "folder", "--out", "rows.txt"), (".csv or .jsonl", "rows.txt")),
    (("inspect", "score", "folder", "folder", "--tiff"), ("--tiff", "--maps")),
    (("capsule", "train", "--data", "nowhere"), ("--data", "no such file or folder: nowhere")),
    (("capsule", "reproduce", "--data", "nowhere"), ("no such file or folder: nowhere",)),
    (("inspect", "calibrate", "nowhere"), ("MODEL", "no such file or folder: nowhere")),
    (("inspect", "eval", "nowhere", "--data", "folder"), ("MODEL", "nowhere")),
    (("capsule", "sample"), ("MODEL", "no such file or folder: results")),
    (("inspect", "score", "nowhere", "folder"), ("no such file or folder: nowhere",)),
    (("inspect", "score", "folder", "foldr"), ("no such file or folder: foldr", "did you mean folder?")),
    (("inspect", "score", "folder", "*.png"), ("nothing matches *.png",)),
    (("inspect", "recalibrate", "folder", "\x1b[2J\x07.png"), (r"\x1b[2J\x07.png",)),
    (("inspect", "export", "folder", "--onnx", "m.onnx", "--check", "nowhere"), ("--check", "nowhere")),
]
FORMER_ERRORS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("train", "--data", "folder", "--recipe", "cake"), ("--recipe", "cake", "inspection")),
    (("train", "--data", "folder", "--recipe", "inspection", "--lr", "1"), ("--lr", "fastmaf inspect fit")),
    (("inspection", "train", "--data", "nowhere"), ("--data", "no such file or folder: nowhere")),
    (("score", "folder", "foldr"), ("did you mean folder?",)),
    (("calibrate", "--model", "nowhere"), ("MODEL", "no such file or folder: nowhere", "inspect calibrate nowhere")),
    (("calibrate", "--model"), ("--model",)),
    (("capsule", "sample", "--model=nowhere"), ("no such file or folder: nowhere", "capsule sample nowhere")),
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
    lines = [*((*line, "--help") for line in (*HELP, *FORMER)), ("--version",)]
    lines += [line for line, _ in (*ERRORS, *FORMER_ERRORS)]
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
    assert done.out.startswith(f"Usage: fastmaf {' '.join(line)}")
    assert not re.search(r"\.\.\.$", done.out.partition("\n")[2], re.MULTILINE), "a text is cut off"
    commands = {(): (*COMMANDS, *TOP), **{(group,): names for group, names in COMMANDS.items()}}.get(line, ())
    assert sorted(re.findall(r"^  ([a-z][a-z-]+)  ", done.out.partition("Commands:")[2], re.MULTILINE)) == sorted(
        commands
    )


@pytest.mark.parametrize("line", FORMER, ids=" ".join)
def test_a_former_spelling_names_its_successor(answers: Any, line: tuple[str, ...]) -> None:
    (done, _), (successor, _) = answers[(*line, "--help")], answers[(*FORMER[line], "--help")]
    assert (done.code, done.out) == (0, successor.out)
    assert re.fullmatch(rf"note: 'fastmaf {line[0]}.*' is now 'fastmaf {' '.join(FORMER[line])}'; .*\n", done.err)


@pytest.mark.parametrize(("line", "words"), FORMER_ERRORS, ids=[" ".join(line) for line, _ in FORMER_ERRORS])
def test_a_usage_error_of_a_former_spelling(answers: Any, line: tuple[str, ...], words: tuple[str, ...]) -> None:
    done, slow = answers[line]
    assert_one_error(done, *words)
    assert (done.code, done.out, slow) == (2, "", [])


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
    done = run("inspect", "recalibrate", "folder", path)
    assert_one_error(done, "no model file at folder")
    assert done.code == 1
