"""The threads of the native library: calls at once, forks, a busy machine, and memory that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmaf.kernels.flow.args import FlowBatch
from tests.core.helpers import build, normal
from tests.kernels.cases import needs
from tests.kernels.native_calls import args_of
from tests.tolerances import F32

pytestmark = needs("native")

ROOT = Path(__file__).resolve().parents[2]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for threads and limits")
# What the scripts of other processes begin with. Only the native library has used several threads when they fork.
BEGIN = """
import os, sys, threading, torch
torch.set_num_threads({threads})
from fastmaf import kernels
from tests.core.helpers import build, normal
from tests.kernels.native_calls import args_of
from tests.kernels.test_native_threads import everything, threads_of_process
kernels.use_backend("native")
args, x = args_of(build(400, hidden_features=(130,), dtype=torch.float32)), normal(40, 400, dtype=torch.float32)
several = len(os.sched_getaffinity(0)) > 1 and {threads} > 1
def same(a, b):
    return all((one.numpy() == two.numpy()).all() for one, two in zip(a, b, strict=True))
"""


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def threads_of_process() -> int:
    return len(os.listdir("/proc/self/task"))


def everything(x: Tensor, args: Any) -> list[Tensor]:
    """Returns the results of all passes of a flow."""
    from fastmaf.kernels.flow import native

    z, ladj, saved = native.forward(x, args, True)
    back = native.inverse(z, args.inverted())
    grad_x, weights, biases = native.backward(FlowBatch(z, ladj, saved), args, True)
    return [z, ladj, saved, *back, grad_x, *weights, *biases]


def run(script: str, threads: int = 2) -> str:
    """Runs a script in a process of its own, which must end well and soon."""
    code = BEGIN.format(threads=threads) + textwrap.dedent(script)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.usefixtures("threads")
def test_calls_at_once_give_what_calls_in_turn_give() -> None:
    models = [
        (normal(n, d, dtype=F32), args_of(build(d, hidden_features=hidden, dtype=F32)))
        for n, d, hidden in ((40, 400, (130,)), (1, 700, (90, 40)), (130, 37, (200,)), (3, 5, (4,)))
    ]
    torch.set_num_threads(1)
    expected = [everything(*model) for model in models]
    torch.set_num_threads(3)

    def work(i: int) -> bool:
        found = [(k % 4, everything(*models[k % 4])) for k in range(i, i + 8)]
        return all(torch.equal(a, b) for k, results in found for a, b in zip(results, expected[k], strict=True))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


@linux
def test_torch_says_how_many_threads_there_are() -> None:
    run("""
        before = threads_of_process()
        expected = everything(x, args)
        assert threads_of_process() == before, "one thread is the calling one"
        torch.set_num_threads(2)
        assert same(everything(x, args), expected)
        more = len(os.sched_getaffinity(0)) > 1
        assert threads_of_process() == before + more, threads_of_process()
        torch.set_num_threads(50)
        assert same(everything(x, args), expected)
        assert threads_of_process() < before + len(os.sched_getaffinity(0)), "no more than there are cores"
        everything(x[:1, :5].contiguous(), args_of(build(5, dtype=torch.float32)))
    """, threads=1)  # fmt: skip


@linux
def test_forked_processes_have_threads_of_their_own() -> None:
    """After a call, during a call of another thread, twice in a row, and by multiprocessing."""
    assert run("""
        import multiprocessing, traceback
        expected = everything(x, args)

        def child(depth=0):
            assert threads_of_process() == 1
            ends = [None, None]
            def work(i):
                ends[i] = all(same(everything(x, args), expected) for _ in range(3))
            both = [threading.Thread(target=work, args=(i,)) for i in range(2)]
            [t.start() for t in both], [t.join() for t in both]
            assert ends == [True, True]
            assert threads_of_process() >= 1 + several, threads_of_process()
            if depth == 0:
                forked(depth + 1)

        def forked(depth=0):
            sys.stdout.flush()
            if (pid := os.fork()) == 0:
                code = 1
                try:
                    child(depth)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            assert os.waitpid(pid, 0)[1] == 0

        forked()
        assert same(everything(x, args), expected)
        busy = True
        def call():
            while busy:
                everything(x, args)
        other = threading.Thread(target=call)
        other.start()
        for _ in range(10):
            forked(1)
        busy = False
        other.join()
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
        assert process.exitcode == 0
        assert same(everything(x, args), expected)
        print("ended")
    """) == "ended\n"  # fmt: skip


@linux
def test_memory_that_is_not_there_is_an_error_and_the_next_call_works() -> None:
    """On the calling thread, and on all threads of a call."""
    run("""
        import resource
        from fastmaf.kernels.flow import native
        wide = args_of(build(2, hidden_features=(200_000,), dtype=torch.float32))
        many = normal(100, 2, dtype=torch.float32)
        expected, few = everything(x, args), native.forward(many[:2], wide, False)
        pages = int(open("/proc/self/statm").read().split()[0])
        def limited(megabytes, call):
            limits = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (megabytes << 20), limits[1]))
            try:
                call()
            except MemoryError as error:
                return str(error)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, limits)
        for _ in range(2):
            message = limited(100, lambda: native.forward(many, wide, False))  # 200 MB of hidden units
            assert message == "the native kernels could not allocate their work buffers", message
            assert same(native.forward(many[:2], wide, False), few)
            assert same(everything(x, args), expected)
    """)  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
def test_calls_while_other_processes_use_all_cores() -> None:
    args, x = args_of(build(400, hidden_features=(130,), dtype=F32)), normal(40, 400, dtype=F32)
    torch.set_num_threads(1)
    expected = everything(x, args)
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        torch.set_num_threads(4)
        for _ in range(30):
            assert all(torch.equal(a, b) for a, b in zip(everything(x, args), expected, strict=True))
    finally:
        for other in others:
            other.kill()
            other.wait()
