"""Several processes of one training run: what one draws, and how all end where one fails."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

import fastmaf
from fastmaf.capsule import training_run
from fastmaf.capsule.config import TrainConfig
from fastmaf.io.locks import run_lock
from fastmaf.training.checkpoints import MODEL_FILE, load_state
from tests.capsule.runs import at_batch, epoch, run, same, tensors_of, with_
from tests.training.test_failures import as_torchrun_starts_them

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed package"),
]
THREE = with_(epochs=3, batch_size=8, holdout=0.0)  # ten images: batches of eight and two


def with_dropout(self: TrainConfig, device: Any = None) -> fastmaf.MAF:
    return fastmaf.MAF(self.features, 2, (16,), dropout=0.3, order="natural", seed=self.seed)


def prepared(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    as_torchrun_starts_them(rank, size, folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    training_run.nll_curve = lambda path, *_: path.touch()  # type: ignore[assignment]
    training_run._SECONDS_BETWEEN_CHECKPOINTS = -1.0
    TrainConfig.build = with_dropout  # type: ignore[method-assign]


def ctrl_c(x: Tensor) -> Tensor:
    signal.raise_signal(signal.SIGINT)
    return x


def whole_and_broken(rank: int, size: int, folder: str, data: Path) -> None:
    prepared(rank, size, folder)
    run(data, Path(folder) / "whole", THREE)
    with pytest.MonkeyPatch.context() as patch:
        if rank == size - 1:
            at_batch(patch, 3, ctrl_c)
        assert run(data, Path(folder) / "broken", THREE).interrupted
    torch.manual_seed(99 + rank)  # nothing depends on it
    run(data, Path(folder) / "broken", THREE, resume=True)
    distributed.destroy_process_group()


@pytest.mark.parametrize("size", [2, 4])
def test_each_process_continues_its_own_stream(data: Path, tmp_path: Path, size: int) -> None:
    torch.multiprocessing.spawn(whole_and_broken, (size, str(tmp_path), data), nprocs=size)
    (tensors, state), (others, expected) = load_state(tmp_path / "broken"), load_state(tmp_path / "whole")
    assert same(tensors_of(tmp_path / "broken"), tensors_of(tmp_path / "whole"))
    assert same(tensors, others) and state["steps"] == expected["steps"] == 6
    streams = [tensors["rng/cpu"], *(tensors[f"rng/{rank}/cpu"] for rank in range(1, size))]
    assert len({bytes(stream.numpy()) for stream in streams}) == size


def broken(rank: int, size: int, folder: str, data: Path) -> None:
    prepared(rank, size, folder)
    with pytest.MonkeyPatch.context() as patch:
        at_batch(patch, 3, ctrl_c)
        assert run(data, Path(folder) / "broken", THREE).interrupted
    distributed.destroy_process_group()


def continued(rank: int, size: int, folder: str, data: Path, out: str) -> None:
    prepared(rank, size, folder)
    seen: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        at_batch(patch, 1, lambda x: (seen.append(torch.get_rng_state()), x)[1])
        run(data, Path(out), THREE, resume=True)
    torch.save(seen, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_another_number_of_processes_begins_new_streams_that_can_be_repeated(data: Path, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(broken, (2, str(tmp_path), data), nprocs=2)
    before = load_state(tmp_path / "broken")[0]
    for turn in ("first", "second"):
        (tmp_path / turn).mkdir()
        out = shutil.copytree(tmp_path / "broken", tmp_path / turn / "out")
        torch.multiprocessing.spawn(continued, (4, str(tmp_path / turn), data, str(out)), nprocs=4)
    assert same(tensors_of(tmp_path / "first" / "out"), tensors_of(tmp_path / "second" / "out"))
    states = [torch.load(tmp_path / "first" / f"{rank}.pt")[0] for rank in range(4)]
    kept = [before["rng/cpu"], before["rng/1/cpu"]]
    assert len({bytes(state.numpy()) for state in (*states, *kept)}) == 6


def faults(rank: int, size: int, folder: str, data: Path) -> None:
    prepared(rank, size, folder)

    def refuse(x: Tensor) -> Tensor:
        raise OSError("the image is gone")

    def call(step: int, values: Any) -> None:
        if step == last:
            raise LookupError(f"no logger at {step}")

    for last in (1, 3):  # the first process calls; after the last epoch, the others have nothing left to do
        out = Path(folder) / f"called {last}"
        words = f"process 0 of 2 failed: LookupError: no logger at {last}"
        with pytest.raises(fastmaf.ProcessFailedError, match=words):
            run(data, out, THREE, callbacks=[call])
        assert load_state(out, tensors=False)[1]["epochs_done"] == last, "a checkpoint was written before"
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            at_batch(patch, epoch(2), refuse)
        with pytest.raises(fastmaf.ProcessFailedError, match="process 1 of 2 failed: OSError: the image is gone"):
            run(data, Path(folder) / "read", THREE)
    assert (Path(folder) / "read" / MODEL_FILE).exists()
    one = with_(epochs=1, batch_size=3, holdout=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainConfig, "build", with_batch_norm)
        words = "process 1 of 2 failed: ValueError: BatchNorm needs a batch of at least 2 rows"
        with pytest.raises(fastmaf.ProcessFailedError, match=words):
            run(data, Path(folder) / "one row", one)
    (Path(folder) / "locked").mkdir(exist_ok=True)
    distributed.barrier()
    with pytest.MonkeyPatch.context() as patch:
        lock = run_lock(Path(folder) / "locked" / MODEL_FILE, "training") if rank == 0 else patch.context()
        with lock, pytest.raises(fastmaf.ProcessFailedError, match="process 0 of 2 failed: InUseError: .*is in use"):
            run(data, Path(folder) / "locked", THREE)
    distributed.destroy_process_group()


def with_batch_norm(self: TrainConfig, device: Any = None) -> fastmaf.MAF:
    return fastmaf.MAF(self.features, 2, (16,), normalization="batch", order="natural", seed=self.seed)


def test_a_failure_in_one_process_ends_all(data: Path, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(faults, (2, str(tmp_path), data), nprocs=2)


def split_and_whole(rank: int, size: int, folder: str, data: Path) -> None:
    prepared(rank, size, folder)
    for shard in (False, True):
        run(data, Path(folder) / f"split {shard}", THREE, shard_optimizer=shard)
    with pytest.MonkeyPatch.context() as patch:
        at_batch(patch, 3, ctrl_c)
        assert run(data, Path(folder) / "broken", THREE, shard_optimizer=True).interrupted
    distributed.destroy_process_group()


def resumed_split(rank: int, size: int, folder: str, data: Path, out: str) -> None:
    prepared(rank, size, folder)
    run(data, Path(out), THREE, resume=True, shard_optimizer=True)
    distributed.destroy_process_group()


def test_split_moments_are_saved_whole_and_go_on_in_any_number_of_processes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.multiprocessing.spawn(split_and_whole, (2, str(tmp_path), data), nprocs=2)
    assert same(tensors_of(tmp_path / "split True"), tensors_of(tmp_path / "split False"))
    (split, state), (whole, _) = load_state(tmp_path / "split True"), load_state(tmp_path / "split False")
    assert same(split, whole) and any(name.endswith("/exp_avg_sq") for name in split)
    for size in (2, 4):
        (tmp_path / f"{size}").mkdir()
        out = shutil.copytree(tmp_path / "broken", tmp_path / f"{size}" / "out")
        torch.multiprocessing.spawn(resumed_split, (size, str(tmp_path / f"{size}"), data, str(out)), nprocs=size)
        assert load_state(out, tensors=False)[1]["steps"] == state["steps"]
    assert same(tensors_of(tmp_path / "2" / "out"), tensors_of(tmp_path / "split False"))
    monkeypatch.setattr(TrainConfig, "build", with_dropout)
    run(data, tmp_path / "broken", THREE, resume=True)  # by one process
    assert load_state(tmp_path / "broken", tensors=False)[1]["steps"] == state["steps"]
