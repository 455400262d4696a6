"""``fastmaf inspect score`` in processes of its own: Ctrl-C, watching a folder, several processes of torchrun."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import distributed
from typer.testing import CliRunner

from fastmaf.cli.app import app
from fastmaf.inspection.workflow.calibrate import calibrate
from tests.inspection.tiny import silent

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
needs_sigint = pytest.mark.skipif(os.name == "nt", reason="Ctrl-C cannot be sent to one process there")


def image(path: Path, seed: int) -> Path:
    values = np.random.default_rng(seed).integers(100, 150, (20, 24, 3)).astype(np.uint8)
    Image.fromarray(values).save(path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (folder := tmp_path / "in").mkdir()
    for i in range(9):
        image(folder / f"{i}.png", i)
    (folder / "4.png").write_bytes(b"no image")
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def until(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 200
    while not holds():
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.05)


@contextmanager
def started(*arguments: object, log: Path) -> Iterator[subprocess.Popen[str]]:
    """Runs the command, whose messages go to ``log``; it is ended at the end."""
    command = [sys.executable, "-m", "fastmaf", "inspect", "score", *map(str, arguments)]
    with open(log, "w") as file, subprocess.Popen(command, env=ENVIRONMENT, stderr=file, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_exit_codes(run: Path, images: Path, tmp_path: Path) -> None:
    def code(*arguments: object) -> int:
        return CliRunner().invoke(app, ["inspect", "score", *map(str, arguments), "--quiet"]).exit_code

    model = tmp_path / "model.safetensors"
    model.write_bytes((run / "model.safetensors").read_bytes())
    calibrate(model, 0.9, say=silent)  # noise is anomalous beside good images
    assert code(model, images / "1.png") == 0
    assert code(model, images / "1.png", "--fail-on-anomaly") == 3
    assert code(model, images, "--fail-on-anomaly") == 3, "even if a file could not be read"
    assert code(model, images) == 2
    assert code(model, "--fail-on-anomaly") == code(model, images, "--watch", images) == 2
    assert code(model, images, "--resume") == code(model, images / "nowhere") == 2


@pytest.mark.slow
@needs_sigint
def test_ctrl_c_leaves_a_journal_that_goes_on(run: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "in").mkdir()
    image(folder / "0000.png", 0)
    for i in range(1, 1500):
        os.link(folder / "0000.png", folder / f"{i:04d}.png")
    out, log = tmp_path / "out.csv", tmp_path / "log"
    journal = tmp_path / "out.csv.partial"
    arguments = (run, folder, "--out", out, "--workers", 2, "--quiet", "--maps", tmp_path / "maps")
    with started(*arguments, log=log) as process:
        until(lambda: journal.exists() and len(journal.read_bytes().splitlines()) > 40, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(200) == 130
    text = log.read_text()
    assert "--resume continues" in text and text.rstrip().endswith("stopped") and "Traceback" not in text
    done = len(journal.read_bytes().splitlines()) - 1
    assert 40 <= done < 1500 and not out.exists()
    with started(*arguments, "--resume", log=log) as process:
        assert process.wait(400) == 0
    assert f"continuing after {done:,} images" in log.read_text()
    assert [Path(row["file"]).name for row in rows(out)] == [f"{i:04d}.png" for i in range(1500)]
    assert len(list((tmp_path / "maps").iterdir())) == 1500 and not journal.exists()


@pytest.mark.slow
@needs_sigint
def test_a_folder_is_watched_until_ctrl_c(run: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "in").mkdir()
    image(folder / "0.png", 0)
    out, log = tmp_path / "out.csv", tmp_path / "log"
    whole = image(tmp_path / "1.png", 1).read_bytes()
    arguments = (run, "--watch", folder, "--out", out)
    with started(*arguments, log=log) as process:
        until(lambda: out.exists() and len(rows(out)) == 1, process)
        (folder / "1.png").write_bytes(whole[: len(whole) // 2])
        image(folder / "2.png", 2)
        until(lambda: len(rows(out)) == 2, process)
        (folder / "1.png").write_bytes(whole)
        until(lambda: len(rows(out)) == 3, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(200) == 0
    assert [Path(row["file"]).name for row in rows(out)] == ["0.png", "2.png", "1.png"]
    text = log.read_text()
    assert "3 images scored" in text and "Traceback" not in text and "skipped" not in text
    image(folder / "3.png", 3)
    with started(*arguments, "--resume", "--fail-on-anomaly", log=log) as process:
        until(lambda: len(rows(out)) == 4, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(200) in (0, 3)
    assert "continuing after 3 images" in log.read_text() and "4 images scored" in log.read_text()
    assert [Path(row["file"]).name for row in rows(out)] == ["0.png", "2.png", "1.png", "3.png"]


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed package")
def test_processes_of_torchrun_share_the_files(run: Path, images: Path, tmp_path: Path) -> None:
    def scored(processes: int, out: Path) -> str:
        together = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(together if processes > 1 else ()), "-m", "fastmaf", "inspect", "score"]
        command += [str(run), str(images), "--out", str(out), "--quiet", "--overlays", str(tmp_path / out.stem)]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
        assert done.returncode == 2 - (processes > 1), done.stderr[-3000:]  # torchrun's own code
        return done.stderr

    (images / "10.png").write_bytes((images / "1.png").read_bytes())
    alone, together = tmp_path / "alone.csv", tmp_path / "together.csv"
    expected = scored(1, alone).splitlines()[-1]
    text = scored(3, together)
    assert expected.startswith("9 images scored") and text.count(expected) == text.count("images scored") == 1
    names = ("file", "score", "p_value", "verdict", "nll")
    ours, theirs = ([[row[name] for name in names] for row in rows(path)] for path in (together, alone))
    assert ours == theirs and len(ours) == 9
    assert sorted(path.name for path in (tmp_path / "together").iterdir()) == sorted(
        path.name for path in (tmp_path / "alone").iterdir()
    )
    assert list(tmp_path.glob("*.partial*")) == []
