"""Hundreds of damaged model files: each is refused by a message that names it, or loads and computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# In a process of its own, as a limit of memory holds for a whole process and for good.
CHILD = """
import re, resource, signal, sys, warnings
from pathlib import Path

import fastmaf
from tests.io.model_files import mutants, use, write_all

warnings.simplefilter("ignore")
folder, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
contents = write_all(folder)
for kind, content in contents.items():
    use(kind, folder, content)

used = int(re.search(r"VmSize:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)

def expired(*_):
    raise BaseException("the deadline has passed")

signal.signal(signal.SIGALRM, expired)
loaded = refused = 0
for i, (kind, mutation, content) in enumerate(mutants(contents, count, seed)):
    file = folder / ("folds" if kind.startswith("fold") else "") / f"{kind}.safetensors"
    signal.alarm(30)
    try:
        use(kind, folder, content)
        loaded += 1
    except fastmaf.CheckpointError as error:
        refused += 1
        message = str(error)
        if str(folder) not in message or len(message) > 1200 or not message.isprintable():
            print("message of mutant", i, kind, mutation, ascii(message[:300]))
    except BaseException as error:
        print("mutant", i, kind, mutation, type(error).__name__, ascii(str(error)[:300]))
    signal.alarm(0)
    file.write_bytes(contents[kind])
print(loaded, "loaded", refused, "refused")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process as Linux does")
@pytest.mark.parametrize("seed", [0])
@pytest.mark.slow
def test_damaged_files_are_refused_or_compute(tmp_path: Path, seed: int) -> None:
    count = 600
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(count), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    *faults, summary = done.stdout.splitlines()
    assert faults == []
    loaded, refused = (int(word) for word in summary.split() if word.isdigit())
    assert loaded + refused == count
    assert loaded > 20 and refused > 300, "the mutations do not damage, or are all noticed at once"
