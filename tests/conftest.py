"""What every test gets: one hypothesis profile, the backend choice put back after each, and each backend in turn."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Where no GPU can run the Triton kernels they are interpreted on the CPU. Triton reads this when it defines a kernel,
# so it is set before fastmaf is imported. Nothing else changes: CPU tensors go to them only where a test asks for it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastmaf.inspection import free_threads
from fastmaf.kernels import dispatch

os.environ["COLUMNS"] = "80"  # the width of help texts, whatever the terminal's is

# HYPOTHESIS_PROFILE=explore looks for new failures; the default repeats the same examples on every machine.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.register_profile("explore", deadline=None, max_examples=300, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def default_backend() -> Iterator[None]:
    """Undoes a backend that a test has set for the whole process."""
    before = dispatch.chosen()
    yield
    dispatch.use_backend(before)


@pytest.fixture(scope="session", autouse=True)
def threads_of_fits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fits take as many threads beside busy neighbours as alone: sums, and with them the last bits, depend on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(free_threads, "_LOAD", tmp_path_factory.mktemp("load") / "missing")
        yield


@pytest.fixture(params=["torch", "native"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on each backend of the CPU; skips those that this installation lacks, and says why."""
    name: str = request.param
    for op in dispatch.OPS:
        if (reason := dispatch.missing(op, name)) is not None:
            pytest.skip(reason)
    with dispatch.use_backend(name):
        yield name


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Runs a test on one thread: small work is over before a second one starts, and busy machines wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user can enter, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)
