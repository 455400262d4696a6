"""Training runs: what they write, that they repeat, what they refuse and when they stop."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.main import get_command

import fastmaf
from fastmaf.capsule import training_run
from fastmaf.capsule.config import GUARDED
from fastmaf.capsule.models import load_model, nll_of
from fastmaf.capsule.sample import sample
from fastmaf.capsule.training_run import CURVE_FILE, LOG_COLUMNS, LOG_FILE, TrainingStoppedError
from fastmaf.cli.capsule import app
from fastmaf.images.dataset import load_train
from fastmaf.images.decode import DataError
from fastmaf.metrics.plots import nll_curve
from fastmaf.training.checkpoints import MODEL_FILE, STATE_FILE, load_state, training_of
from tests.capsule.runs import (
    HELD_OUT,
    IMAGES,
    STEPS,
    at_batch,
    epoch,
    rows,
    run,
    same,
    tensors_of,
    with_,
    without_seconds,
)

pytestmark = [pytest.mark.usefixtures("undrawn"), pytest.mark.filterwarnings("ignore::fastmaf.ConnectivityWarning")]


def test_a_run_writes_its_model_log_and_curve(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_run, "nll_curve", nll_curve)
    result = run(data, tmp_path, with_(epochs=3), published={1: 8002.67})
    assert not result.interrupted
    assert result.model == tmp_path / MODEL_FILE
    assert {p.name for p in tmp_path.iterdir()} == {MODEL_FILE, STATE_FILE, LOG_FILE, CURVE_FILE}
    with Image.open(tmp_path / CURVE_FILE) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert min(picture.size) > 300
    log = rows(tmp_path)
    assert tuple(log[0]) == LOG_COLUMNS
    assert [row["epoch"] for row in log] == ["1", "2", "3"]
    nll = [float(row["nll"]) for row in log]
    assert nll == sorted(nll, reverse=True), "a tiny model on eight images only gets better in three epochs"
    for row, kept in zip(log, result.log, strict=True):
        assert float(row["nll"]) == pytest.approx(kept["nll"], rel=1e-9)
        assert float(row["bits_per_dim"]) == pytest.approx(float(row["nll"]) / (192 * math.log(2)), rel=1e-8)
        assert float(row["seconds"]) > 0
        assert row["skipped_steps"] == "0"


@pytest.mark.parametrize("flushed", [False, True])
def test_the_callers_setting_for_denormal_numbers_is_restored(data: Path, tmp_path: Path, flushed: bool) -> None:
    torch.set_flush_denormal(flushed)
    try:
        run(data, tmp_path, with_(epochs=1))
        assert (float(torch.tensor(1e-40) * 1) == 0) == flushed
    finally:
        torch.set_flush_denormal(False)


def test_the_model_file_loads_and_names_the_held_out_images(data: Path, tmp_path: Path) -> None:
    result = run(data, tmp_path)
    model = load_model(tmp_path)
    assert (model.size, model.path) == (8, tmp_path / MODEL_FILE)
    assert same(model.flow.state_dict(), result.flow.state_dict())
    trained_on = load_state(tmp_path)[1]["files"]
    everything = [path.name for path in load_train(data, size=8, progress=False).paths]
    assert len(model.held_out) == HELD_OUT
    assert sorted([*model.held_out, *trained_on]) == everything
    about = training_of(tmp_path / MODEL_FILE)
    assert about["epochs_done"] == 2
    assert about["steps"] == 2 * STEPS


@pytest.mark.parametrize(("share", "kept_out"), [(0.0, 0), (0.1, 1), (0.5, 5), (0.9, 9)])
def test_the_share_held_out(data: Path, tmp_path: Path, share: float, kept_out: int) -> None:
    run(data, tmp_path, with_(holdout=share, epochs=1))
    assert len(load_model(tmp_path).held_out) == kept_out
    assert len(load_state(tmp_path)[1]["files"]) == IMAGES - kept_out
    assert (rows(tmp_path)[0]["val_nll"] == "") is (kept_out == 0)


def test_holding_out_everything_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holding out 0\.99 of 10 images leaves none to train on"):
        run(data, tmp_path, with_(holdout=0.99))


def test_the_validation_nll_is_that_of_the_held_out_images(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path)
    model = load_model(tmp_path)
    images = load_train(data, size=8, progress=False)
    held_out = images.subset([i for i, path in enumerate(images.paths) if path.name in model.held_out])
    expected = float(nll_of(model.flow, held_out, progress=False).mean())
    assert float(rows(tmp_path)[-1]["val_nll"]) == pytest.approx(expected, rel=1e-6)


def test_the_nll_of_an_epoch_is_the_mean_over_its_images(data: Path, tmp_path: Path) -> None:
    """With a tiny learning rate the model does not change, nor does its mean over the images."""
    config = with_(epochs=1, lr=1e-12, batch_size=3)  # batches of 3, 3 and 2: the mean of their means differs
    run(data, tmp_path, config)
    images = load_train(data, size=8, progress=False)
    held_out = load_model(tmp_path).held_out
    normals = images.subset([i for i, path in enumerate(images.paths) if path.name not in held_out])
    expected = float(nll_of(config.build(), normals, progress=False).mean())
    assert float(rows(tmp_path)[0]["nll"]) == pytest.approx(expected, rel=1e-6)


def test_the_seed_makes_a_run_repeatable(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "a")
    run(data, tmp_path / "b")
    run(data, tmp_path / "c", with_(seed=1))
    assert same(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b"))
    assert without_seconds(tmp_path / "a") == without_seconds(tmp_path / "b")
    assert not same(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "c"))
    assert load_model(tmp_path / "a").held_out != load_model(tmp_path / "c").held_out


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_model(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_epoch: None
) -> None:
    run(data, tmp_path / "two", with_(epochs=2))
    at_batch(monkeypatch, epoch(3) + 1, lambda x: x * math.nan)
    with pytest.raises(TrainingStoppedError) as stopped:
        run(data, tmp_path / "stopped", with_(epochs=5))
    monkeypatch.undo()
    message = str(stopped.value)
    assert "NLL of a batch became nan at step 6" in message
    assert f"the last good model, after epoch 2, is kept in {tmp_path / 'stopped' / MODEL_FILE}" in message
    assert "--lr" in message
    kept, two = (load_model(tmp_path / name).flow.state_dict() for name in ("stopped", "two"))
    assert same(kept, two)
    assert len(rows(tmp_path / "stopped")) == 2
    assert len(run(data, tmp_path / "stopped", with_(epochs=5), resume=True).log) == 5


def test_the_message_of_a_stopped_run_names_only_options_that_exist(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_batch(monkeypatch, 1, lambda x: x * math.nan)
    with pytest.raises(TrainingStoppedError, match="no model was written before that") as stopped:
        run(data, tmp_path)
    command = get_command(app).commands["train"]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    named = set(re.findall(r"--[a-z-]+", str(stopped.value)))
    assert named
    assert named <= known
    assert not (tmp_path / MODEL_FILE).exists()


def test_parameters_that_are_not_finite_are_never_saved(data: Path, tmp_path: Path) -> None:
    """After the last step no loss is computed that would show parameters that are not finite."""
    with pytest.raises(TrainingStoppedError, match=r"parameters are no longer finite after epoch 1.*no model was"):
        run(data, tmp_path, with_(lr=1e39, epochs=1, batch_size=IMAGES))
    assert not (tmp_path / MODEL_FILE).exists()


def test_a_huge_learning_rate_stops_with_the_reason(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingStoppedError, match=r"NLL of a batch became (nan|inf) at step 2"):
        run(data, tmp_path, with_(lr=1e30))


def test_alternating_orders_train_with_the_recommended_settings(data: Path, tmp_path: Path) -> None:
    # Past the warm-up's 100 steps, at a rate that suits a tiny model.
    config = with_(order="alternate", epochs=24, batch_size=1, **{**GUARDED, "lr": 1e-3})
    nll = [row["nll"] for row in run(data, tmp_path, config).log]
    assert all(value is not None and math.isfinite(value) for value in nll)
    assert nll[-1] < nll[0] - 5  # type: ignore[operator]
    best = math.inf
    for value in nll:
        assert value is not None
        assert value < best + 0.05 * abs(best) or best == math.inf
        best = min(best, value)
    flow = load_model(tmp_path).flow
    assert any(isinstance(t, fastmaf.Permutation) for t in flow.transforms)
    x = flow.sample(2)
    assert torch.isfinite(x).all()


def test_skipped_steps_are_counted(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_batch(monkeypatch, epoch(2), lambda x: 1000 * x)
    run(data, tmp_path, with_(epochs=3, max_loss_jump=5.0))
    assert [row["skipped_steps"] for row in rows(tmp_path)] == ["0", "1", "0"]


def test_a_model_with_leaky_masks_trains_and_scores_but_does_not_sample(data: Path, tmp_path: Path) -> None:
    result = run(data, tmp_path, with_(masks="published", degrees="random", epochs=3))
    nll = [row["nll"] for row in result.log]
    assert nll[-1] < nll[0]  # type: ignore[operator]
    model = load_model(tmp_path)
    scores = nll_of(model.flow, load_train(data, size=8, progress=False), progress=False)
    assert all(math.isfinite(score) for score in scores)
    with pytest.raises(fastmaf.NotInvertibleError, match=r"leaky output mask.*train with strict masks"):
        sample(model, tmp_path, 1, progress=False)
    assert not (tmp_path / "samples").exists()


def test_bad_files_are_named_or_left_out(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = Path(shutil.copytree(data, tmp_path / "data"))
    victim = broken / "train" / "good" / "004.png"
    victim.write_bytes(victim.read_bytes()[:200])
    with pytest.raises(DataError, match=r"004\.png"):
        run(broken, tmp_path / "out")
    assert not (tmp_path / "out" / MODEL_FILE).exists()
    run(broken, tmp_path / "out", skip_bad=True)
    assert "1 file skipped" in capsys.readouterr().err
    seen = [*load_model(tmp_path / "out").held_out, *load_state(tmp_path / "out")[1]["files"]]
    assert len(seen) == IMAGES - 1
    assert "004.png" not in seen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 0}, "size must be at least 1; found 0"),
        ({"epochs": -1}, "epochs must be at least 1; found -1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"lr": math.nan}, "lr must be positive; found nan"),
        ({"holdout": 1.0}, r"0 <= holdout < 1; found 1\.0"),
        ({"holdout": -0.1}, r"found -0\.1"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_(**changes)
