"""Images read ahead in processes: the same as one after the other, in order, and nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmaf.images import read_ahead
from fastmaf.images.read_ahead import BATCH, ReadAhead, ReaderEndedError, ReadImage, Unreadable, in_order

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """More files than are read in this process, the third of which is damaged."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    paths = [folder / f"{i:03d}.png" for i in range(2 * BATCH + 9)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(path)
    paths[2].write_bytes(paths[2].read_bytes()[:60])
    return paths


def read(files: list[Path], processes: int, keep_full: bool = False) -> list[ReadImage | Unreadable]:
    with ReadAhead(8, keep_full=keep_full, processes=processes) as reader:
        return [result for batch in reader.read(files) for result in batch]


@pytest.mark.parametrize("keep_full", [False, True])
def test_processes_read_what_one_reads(files: list[Path], keep_full: bool) -> None:
    alone, ahead = read(files, 0, keep_full), read(files, 2, keep_full)
    assert len(alone) == len(ahead) == len(files)
    for file, expected, found in zip(files, alone, ahead, strict=True):
        if isinstance(expected, Unreadable):
            assert found == expected and file == files[2] == expected.path and str(file) in expected.reason
            continue
        assert isinstance(found, ReadImage) and found.image.path == expected.image.path == file
        assert np.array_equal(found.image.pixels, expected.image.pixels) and found.stamp == expected.stamp
        assert (found.image.full is not None) == keep_full
        if found.image.full is not None:
            assert np.array_equal(found.image.full, expected.image.full)


def test_few_files_start_no_process(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "ProcessPoolExecutor", None)
    assert len(read(files[: 2 * BATCH], 2)) == 2 * BATCH


def test_processes_import_no_torch() -> None:
    code = "import sys, fastmaf.images.read_ahead; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_results_are_in_order_and_no_more_is_begun_than_was_asked_for() -> None:
    begun: list[int] = []
    with ThreadPoolExecutor(3) as pool:

        def later(item: int) -> int:
            time.sleep(0.02 * (item % 3 == 0))
            return item

        def submit(item: int):  # type: ignore[no-untyped-def]
            begun.append(item)
            return pool.submit(later, item)

        results = in_order(submit, range(10), ahead=3)
        assert next(results) == 0 and begun == [0, 1, 2, 3]
        assert list(results) == list(range(1, 10))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal there")
def test_a_killed_process_is_an_error_that_says_so(files: list[Path]) -> None:
    with ReadAhead(8, processes=1) as reader:
        batches = reader.read([*files, *files, *files])
        next(batches)
        assert reader._pool is not None
        for process in list(reader._pool._processes.values()):
            os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(ReaderEndedError, match="ended unexpectedly"):
            list(batches)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
def test_processes_end_with_one_that_was_killed(files: list[Path], tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time\nfrom pathlib import Path\nfrom fastmaf.images.read_ahead import ReadAhead\n"
        "if __name__ == '__main__':\n"
        "    reader = ReadAhead(8, processes=2)\n"
        "    list(reader.read([Path(name) for name in sys.argv[1:]]))\n"
        "    print(*reader._pool._processes, flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, str(program), *map(str, files)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        children = parent.stdout.readline().split()
        parent.kill()
    assert len(children) == 2
    end = time.monotonic() + 60
    while any(Path("/proc", child).is_dir() for child in children):
        assert time.monotonic() < end, "the processes are still there"
        time.sleep(0.05)
