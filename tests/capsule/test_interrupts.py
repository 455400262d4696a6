"""Ctrl-C at any moment, then --resume: equal to the bit to an uninterrupted run."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf.capsule import train as training
from fastmaf.capsule import training_run
from fastmaf.capsule.config import GUARDED, TrainConfig
from fastmaf.images.progress import Progress
from fastmaf.io import tensor_file
from fastmaf.training.checkpoints import MODEL_FILE, load_state
from tests.capsule.runs import STEPS, as_earlier_version, at_batch, epoch, run, same, tensors_of, with_, without_seconds
from tests.faults import hidden

pytestmark = [pytest.mark.usefixtures("undrawn"), pytest.mark.filterwarnings("ignore::fastmaf.ConnectivityWarning")]
THREE = with_(epochs=3)
BATCHES = 3 * (STEPS + 1)  # of three epochs, with one of validation each
FIFTH = 5  # in the middle of the second epoch
EVERY_BATCH = [pytest.param(n, marks=[pytest.mark.slow] * (n != FIFTH)) for n in range(1, BATCHES + 1)]
WARMING = with_(epochs=3, **{**GUARDED, "order": "alternate", "warmup_steps": 4, "lr": 1e-3})


def ctrl_c(x: Any = None) -> Any:
    signal.raise_signal(signal.SIGINT)
    return x


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[TrainConfig], Path]:
    """Returns the folder of an unbroken run."""
    folders: dict[TrainConfig, Path] = {}

    def of(config: TrainConfig) -> Path:
        if config not in folders:
            folders[config] = tmp_path_factory.mktemp("whole")
            run(data, folders[config], config)
        return folders[config]

    return of


def assert_equal(out: Path, other: Path) -> None:
    """Model, moments, counters and log are the same; only the seconds are not."""
    assert same(tensors_of(out), tensors_of(other))
    (moments, state), (others, expected) = load_state(out), load_state(other)
    assert moments and same(moments, others)
    for content in (state, expected):
        content.pop("checkpoint")
        for row in content["log"]:
            row.pop("seconds")
    assert state == expected
    assert without_seconds(out) == without_seconds(other)
    assert hidden(out) == []


@pytest.mark.parametrize("config", [THREE, WARMING], ids=["plain", "guarded"])
@pytest.mark.parametrize("batch", EVERY_BATCH)
def test_interrupted_at_any_batch(
    data: Path, tmp_path: Path, interrupts: None, whole: Callable[[TrainConfig], Path], config: TrainConfig, batch: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_batch(patch, batch, ctrl_c)
        result = run(data, tmp_path, config)
    assert result.interrupted
    steps, left = divmod(batch, STEPS + 1)
    assert load_state(tmp_path)[1]["steps"] == steps * STEPS + left, "the step that was interrupted is the last one"
    run(data, tmp_path, config, resume=True)
    assert_equal(tmp_path, whole(config))


def test_interrupted_after_every_step(
    data: Path, tmp_path: Path, interrupts: None, whole: Callable[[TrainConfig], Path]
) -> None:
    for turn in itertools.count():
        with pytest.MonkeyPatch.context() as patch:
            at_batch(patch, 1, ctrl_c)
            run(data, tmp_path, WARMING, resume=turn > 0)
        if len(load_state(tmp_path)[1]["log"]) == WARMING.epochs:
            break
    assert turn >= 3 * STEPS - 1
    assert_equal(tmp_path, whole(WARMING))


def test_interrupted_again_before_a_step_was_taken(
    data: Path, tmp_path: Path, interrupts: None, monkeypatch: pytest.MonkeyPatch, whole: Callable[[TrainConfig], Path]
) -> None:
    """A resumed run that is stopped at once keeps the progress within its epoch."""
    with monkeypatch.context() as patch:
        at_batch(patch, epoch(2), ctrl_c)
        run(data, tmp_path, THREE)
    before = load_state(tmp_path)[1]["epoch_so_far"]
    assert before["batches"] == 1
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "load_state", lambda *args, **kwargs: ctrl_c())
        with pytest.raises(KeyboardInterrupt):  # there is nothing new to save yet
            run(data, tmp_path, THREE, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "Progress", lambda *args, **kwargs: ctrl_c(Progress(*args, **kwargs)))
        assert run(data, tmp_path, THREE, resume=True).interrupted
    assert load_state(tmp_path)[1]["epoch_so_far"] == before
    run(data, tmp_path, THREE, resume=True)
    assert_equal(tmp_path, whole(THREE))


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("write", range(4))
def test_interrupted_while_saving(
    data: Path,
    tmp_path: Path,
    interrupts: None,
    every_epoch: None,
    whole: Callable[[TrainConfig], Path],
    times: int,
    write: int,
) -> None:
    """After one Ctrl-C the checkpoint is finished; after two in a row the previous one is kept."""
    save, calls = tensor_file.save_file, itertools.count()

    def interrupted(*args: Any) -> None:
        if next(calls) == write:
            for _ in range(times):
                ctrl_c()
        save(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_file, "save_file", interrupted)
        if times == 1:
            assert run(data, tmp_path, THREE).interrupted
        else:
            with pytest.raises(KeyboardInterrupt):
                run(data, tmp_path, THREE)
    assert hidden(tmp_path) == []
    run(data, tmp_path, THREE, resume=(tmp_path / MODEL_FILE).exists())
    assert_equal(tmp_path, whole(THREE))


@pytest.mark.parametrize("batch", EVERY_BATCH)
def test_interrupted_twice_in_a_row(
    data: Path,
    tmp_path: Path,
    interrupts: None,
    every_epoch: None,
    whole: Callable[[TrainConfig], Path],
    batch: int,
) -> None:
    def twice(x: Tensor) -> Tensor:
        return ctrl_c(ctrl_c(x))

    with pytest.MonkeyPatch.context() as patch:
        at_batch(patch, batch, twice)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path, THREE)
    assert hidden(tmp_path) == []
    run(data, tmp_path, THREE, resume=(tmp_path / MODEL_FILE).exists())
    assert_equal(tmp_path, whole(THREE))


def test_interrupted_while_reading_images_leaves_nothing(
    data: Path, tmp_path: Path, interrupts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "load_train", lambda *args, **kwargs: ctrl_c())
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_state_of_an_earlier_version_begins_its_broken_epoch_again(
    data: Path, tmp_path: Path, interrupts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state does not contain the progress within an epoch."""
    with monkeypatch.context() as patch:
        at_batch(patch, epoch(2), ctrl_c)
        run(data, tmp_path, THREE)
    as_earlier_version(tmp_path)
    run(data, tmp_path, THREE, resume=True)
    assert load_state(tmp_path)[1]["steps"] == 3 * STEPS + 1


def test_a_resumed_run_counts_its_progress_from_where_it_was(
    data: Path, tmp_path: Path, interrupts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_batch(patch, epoch(2), ctrl_c)
        run(data, tmp_path, THREE)
    counts: list[tuple[int, int | None]] = []

    def seen(*args: Any, **kwargs: Any) -> Progress:
        bar = Progress(*args, **kwargs)
        counts.append((bar.done, bar.total))
        return bar

    monkeypatch.setattr(training_run, "Progress", seen)
    run(data, tmp_path, THREE, resume=True)
    assert counts == [(STEPS + 1, 3 * STEPS)]
    assert fastmaf.load(tmp_path / MODEL_FILE).features == 192


def test_what_a_run_draws_continues_where_it_was(
    data: Path, tmp_path: Path, interrupts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout draws from torch's generator, which the state holds; the caller's is as it was."""

    def build(self: TrainConfig, device: Any = None) -> fastmaf.MAF:
        return fastmaf.MAF(self.features, 2, (16,), dropout=0.3, order="natural", seed=self.seed)

    monkeypatch.setattr(TrainConfig, "build", build)
    before = torch.get_rng_state()
    run(data, tmp_path / "whole", THREE)
    assert torch.equal(torch.get_rng_state(), before)
    run(data, tmp_path / "other", with_(epochs=3, seed=1))
    torch.manual_seed(99)  # neither run depends on it
    with monkeypatch.context() as patch:
        at_batch(patch, epoch(2), ctrl_c)
        assert run(data, tmp_path / "broken", THREE).interrupted
    assert load_state(tmp_path / "broken")[0]["data_order"].shape == (8,)
    run(data, tmp_path / "broken", THREE, resume=True)
    assert_equal(tmp_path / "broken", tmp_path / "whole")


def test_the_order_of_a_broken_epoch_is_that_of_its_state(data: Path, tmp_path: Path, interrupts: None) -> None:
    """Another version of torch may shuffle otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        at_batch(patch, 1, ctrl_c)
        run(data, tmp_path, THREE)
    order = load_state(tmp_path)[0]["data_order"]
    seen: list[list[int]] = []
    shuffle = torch.randperm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", lambda n, **options: torch.arange(8) if n == 8 else shuffle(n, **options))
        patch.setattr(training_run.TrainingRun, "_batch", lambda self, images, index: seen.append(index.tolist()))
        with pytest.raises(Exception, match=".*"):  # without a batch
            run(data, tmp_path, THREE, resume=True)
    assert seen == [order[4:].tolist()]


def test_a_long_epoch_has_checkpoints_within_it(data: Path, tmp_path: Path, every_epoch: None) -> None:
    """A process that is killed loses the steps since the last checkpoint, not the epoch."""
    saved: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "_SECONDS_WITHIN_EPOCHS", -1.0)
        save = training_run.save_state

        def seen(out: Path, flow: Any, moments: Any, state: Any, *args: Any, **kwargs: Any) -> None:
            saved.append((state["epochs_done"], state["epoch_so_far"]["batches"]))
            save(out, flow, moments, state, *args, **kwargs)

        patch.setattr(training_run, "save_state", seen)
        run(data, tmp_path, THREE)
    assert saved[:4] == [(1, 0), (1, 1), (2, 0), (2, 1)]


def test_a_run_that_stops_names_the_steps_in_its_last_good_model(data: Path, tmp_path: Path, every_epoch: None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "_SECONDS_WITHIN_EPOCHS", -1.0)
        at_batch(patch, epoch(2) + 1, lambda x: x * float("nan"))
        with pytest.raises(training_run.TrainingStoppedError, match="after epoch 1 and 1 step of the next, is kept"):
            run(data, tmp_path, THREE)
    run(data, tmp_path, THREE, resume=True)
    assert load_state(tmp_path)[1]["steps"] == 3 * STEPS
