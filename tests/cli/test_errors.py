"""Errors of the system at the command line: one line that names the file, exit code 1, no traceback."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastmaf
from fastmaf import doctor
from tests.cli.command import Fastmaf, assert_one_error
from tests.images.pictures import capsule_set

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full and limits of file sizes")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file of a detector; its images lie beside it in ``good``."""
    root = tmp_path_factory.mktemp("model")
    (root / "good").mkdir()
    for i in range(6):
        values = np.random.default_rng(i).integers(100, 150, (24, 24, 3)).astype(np.uint8)
        Image.fromarray(values).save(root / "good" / f"{i}.png")
    with pytest.warns(UserWarning, match="needs 19 samples"):
        fastmaf.Detector(size=8, steps=2).fit(sorted((root / "good").iterdir())).save(root / "m.safetensors")
    return root / "m.safetensors"


def with_small_files(size: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a command whose files may not exceed ``size`` bytes: it fails as on a full disk, but with EFBIG."""
    code = (
        "import resource, sys; from fastmaf.cli import main;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}));"
        "sys.argv = ['fastmaf', *sys.argv[1:]]; main()"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
@linux
@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        (("inspect", "calibrate", "{model}"), "{model}"),
        (("inspect", "score", "{model}", "{images}", "--quiet", "--overlays", "{out}/heat"), "{out}/heat/0.png"),
        (("inspect", "score", "{model}", "{images}", "--quiet", "--maps", "{out}/m", "--tiff"), "{out}/m/0.tiff"),
        (("inspect", "fit", "--data", "{images}", "--out", "{out}/run", "--size", "8", "--quiet"),
         "{out}/run/model.safetensors"),
        (("capsule", "train", "--data", "{images}", "--out", "{out}/run", "--size", "8", "--quiet", "--epochs", "1",
          "--blocks", "1", "--hidden", "16"), "{out}/run/"),
        (("capsule", "demo-data", "{out}/demo", "--train", "1", "--size", "64", "--quiet"),
         "{out}/demo/train/good/000.png"),
    ],
)  # fmt: skip
def test_a_full_disk_is_one_line(model: Path, tmp_path: Path, arguments: tuple[str, ...], file: str) -> None:
    copy = tmp_path / "m.safetensors"
    copy.write_bytes(model.read_bytes())
    names = {"model": copy, "images": model.parent / "good", "out": tmp_path / "out"}
    done = with_small_files(600, *(argument.format(**names) for argument in arguments))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert last.startswith(f"error: {file.format(**names)}") and last.endswith(": file too large")
    assert copy.read_bytes() == model.read_bytes()
    assert [path.name for path in tmp_path.rglob("*") if path.name.endswith(".tmp")] == []


@linux
@pytest.mark.parametrize("arguments", [("doctor",), ("inspect", "score", "{model}", "{images}", "--quiet")])
def test_standard_output_on_a_full_disk_is_named(model: Path, arguments: tuple[str, ...]) -> None:
    command = [argument.format(model=model, images=model.parent / "good") for argument in arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fastmaf", *command], stdout=full, stderr=subprocess.PIPE, text=True, timeout=300
        )
    assert (done.returncode, done.stderr) == (1, "error: standard output: no space left on device\n")


@linux
@pytest.mark.parametrize("redirect", [">&-", "2>&-", "2>/dev/full"])
@pytest.mark.parametrize("line", ["doctor", "calibrate --model {model}"])
def test_a_closed_or_full_stream_is_no_crash(model: Path, line: str, redirect: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m fastmaf {line.format(model=shlex.quote(str(model)))} {redirect}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0 and bool(done.stdout) == (redirect != ">&-")


def test_a_failed_allocation_is_one_line(run: Fastmaf, model: Path, tmp_path: Path) -> None:
    options = ("--size", "8", "--hidden", "99999999999,2", "--quiet", "--out", tmp_path / "run")
    assert_one_error(run("capsule", "train", "--data", model.parent / "good", *options), "not enough memory")


def test_an_output_in_the_place_of_a_file(run: Fastmaf, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    images, file = model.parent / "good", tmp_path / "file"
    for arguments in (
        ("inspect", "score", model, images, "--overlays", file),
        ("inspect", "score", model, images, "--out", file / "rows.csv"),
        ("inspect", "eval", model, "--data", capsule_set(tmp_path / "set"), "--out", file / "deep"),
    ):
        assert_one_error(run(*arguments, "--quiet"), f"{file}: not a directory")
    for arguments in (
        ("capsule", "train", "--data", images, "--out", file),
        ("inspect", "fit", "--data", images, "--out", file),
        ("capsule", "reproduce", "--out", file),
    ):
        assert_one_error(run(*arguments, "--quiet"), f"expected a folder to write the run to; found the file {file}")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_refused_output_is_one_line(run: Fastmaf, model: Path) -> None:
    images = model.parent / "good"
    before = {path: path.read_bytes() for path in images.iterdir()}
    done = run("inspect", "score", model, images, "--quiet", "--overlays", images)
    assert (done.code, done.out) == (1, "")
    assert_one_error(done, f"{images / '0.png'}: an overlay of an anomaly map would replace a file that is to be read")
    done = run("inspect", "export", model, "--onnx", model, "--check", images)
    assert_one_error(done, f"{model}: an ONNX export would replace a file that is to be read")
    assert {path: path.read_bytes() for path in images.iterdir()} == before


def test_control_characters_of_names_are_escaped(run: Fastmaf, model: Path, tmp_path: Path) -> None:
    done = run("inspect", "score", model, tmp_path / "\x1b[2J\x07nowhere.png")
    assert_one_error(done, r"\x1b[2J\x07nowhere.png")
    assert "\x1b" not in done.err and "\x07" not in done.err


def test_ctrl_c_is_reported(run: Fastmaf, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "report", interrupted)
    done = run("doctor")
    assert (done.code, done.err) == (130, "stopped\n")
