"""A score depends on its image alone: not on the batch, the threads, or the way it is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf.images.dataset import to_unit
from fastmaf.inspection.blocks import fit_blocks
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.detector import Detector
from fastmaf.inspection.model import InspectionModel, load_inspection
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.scoring.float64_flow import FlowValues, rounded
from fastmaf.inspection.scoring.score import TermStatistics, terms_of
from fastmaf.inspection.scoring.settings import AnomalyMapConfig, ScoreSettings
from fastmaf.inspection.whitening import fit_whitening
from fastmaf.io.tensor_file import read_tensors, write_tensors

SETTINGS = (
    ScoreSettings(),
    ScoreSettings(presmooth_sigma=0.7),
    ScoreSettings("map maximum"),
    ScoreSettings("nll"),
    ScoreSettings("typicality"),
    ScoreSettings(source="flow"),
)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pictures(rng: np.random.Generator, size: int) -> Tensor:
    """Thirty pictures of one object in changing light."""
    object_ = rng.uniform(40, 200, (1, 3, size, size))
    light = rng.normal(0, 10, (30, 1, 1, 1))
    pixels = object_ * (1 + 0.1 * rng.normal(size=(30, 1, 1, 1))) + light + rng.normal(0, 4, (30, 3, size, size))
    return torch.from_numpy(np.clip(pixels, 0, 255).astype(np.uint8))


def calibrated_model(normals: Tensor, settings: ScoreSettings, logit: float | None = None) -> InspectionModel:
    """A model of normals, calibrated on them: one of them is the threshold."""
    size = normals.shape[-1]
    recipe, x = Recipe(size=size, rank=12, blocks=2, steps=2, augmentation="none"), to_unit(normals)
    first = [] if logit is None else [fastmaf.Logit(recipe.features, logit)]
    y = fastmaf.Flow(recipe.features, first)(x)[0]
    whitening = fit_whitening(y, recipe)
    blocks = fit_blocks(whitening(y)[0], recipe)
    flow = fastmaf.Flow(recipe.features, [*first, whitening, *blocks]).eval().requires_grad_(False)
    values = FlowValues(flow, x)
    statistics = TermStatistics.of(terms_of(values, settings), values.nll)
    calibration, about = Calibration(np.zeros(1), 0.1, None, "split"), {"map_levels": [0.0, 1.0]}
    draft = InspectionModel(flow, settings, AnomalyMapConfig(8), statistics, calibration, about)
    return draft.with_calibration(Calibration(draft.scores(normals), 0.1, None, "split"))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_scores_verdicts_and_p_values_do_not_depend_on_the_batch(seed: int) -> None:
    rng, settings = np.random.default_rng(seed), SETTINGS[seed % len(SETTINGS)]
    normals = pictures(rng, (8, 12, 16)[seed % 3])
    torch.set_num_threads(1)
    model = calibrated_model(normals, settings)
    expected, calibration = model.predict(normals), model.calibration
    assert not calibration.is_anomalous(expected.scores)[expected.scores == calibration.threshold].any()
    for threads, batch in ((1, 1), (1, 7), (2, 30)):
        torch.set_num_threads(threads)
        values = [model.predict(part) for part in normals.split(batch)]
        for name in ("scores", "nll"):
            together = np.concatenate([getattr(part, name) for part in values])
            np.testing.assert_array_equal(together, getattr(expected, name), err_msg=f"{name}, {threads=}, {batch=}")
        scores = np.concatenate([model.scores(part) for part in normals.split(batch)])
        np.testing.assert_array_equal(calibration.is_anomalous(scores), calibration.is_anomalous(expected.scores))
        np.testing.assert_array_equal(calibration.p_values(scores), calibration.p_values(expected.scores))
        maps = np.concatenate([model.anomaly_maps(part) for part in normals.split(batch)])
        np.testing.assert_allclose(maps, expected.anomaly_maps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("logit", [None, 0.05])
def test_terms_and_nll_are_those_of_the_flow(logit: float | None) -> None:
    normals = pictures(np.random.default_rng(0), 8)
    model, x = calibrated_model(normals, SETTINGS[0], logit), to_unit(normals)
    values, exact = FlowValues(model.flow, x), calibrated_model(normals, SETTINGS[0], logit).flow.double()
    torch.testing.assert_close(values.nll, -exact.log_prob(x.double()), rtol=1e-7, atol=1e-6)
    torch.testing.assert_close(values.nll_per_dim(), exact.nll_per_dim(x.double()), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(values.nll_per_dim().sum(dim=1), values.nll, rtol=1e-8, atol=1e-6)
    whitened = fastmaf.Flow(192, exact.transforms[: 1 + (logit is not None)])(x.double())  # type: ignore[arg-type]
    torch.testing.assert_close(values.whitened[0], whitened[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(values.whitened[1], whitened[1], rtol=1e-9, atol=1e-9)


def test_a_changed_flow_is_scored_as_it_is() -> None:
    normals = pictures(np.random.default_rng(1), 8)
    model = calibrated_model(normals, SETTINGS[0])
    before = model.scores(normals)
    whitening = model.flow.transforms[0]
    assert isinstance(whitening, fastmaf.GaussianWhitening)
    whitening.mean.add_(0.1)
    after = model.scores(normals)
    np.testing.assert_array_equal(after, replace(model).scores(normals))
    assert (after != before).all()


def test_scores_of_rows_do_not_depend_on_the_others() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 3)) @ rng.normal(size=(3, 40)) + 0.1 * rng.normal(size=(200, 40))
    detector = Detector(rank=5).fit(rows)
    together = detector.anomaly_score(rows)
    for size in (1, 3, 64):
        parts = np.array_split(rows, range(size, len(rows), size))
        np.testing.assert_array_equal(np.concatenate([detector.anomaly_score(part) for part in parts]), together)


@pytest.mark.parametrize("seed", range(4))
def test_the_image_at_the_threshold_of_an_older_file_is_good(seed: int, tmp_path: Path) -> None:
    """Files of older versions hold float32 scores, which differ from those of today by up to 1e-4."""
    normals = pictures(np.random.default_rng(seed), 16)
    model = calibrated_model(normals, SETTINGS[seed])
    lower = Calibration(model.calibration.scores - 5e-5, 0.1, None, "split")
    file = tmp_path / "old.safetensors"
    model.with_calibration(lower).save(file)
    tensors, metadata = read_tensors(file)
    record = json.loads(metadata["inspection"])
    del record["about"]["scored_in"]
    write_tensors(tensors, file, {**metadata, "inspection": json.dumps(record)})
    loaded = load_inspection(file)
    scores = loaded.scores(normals)
    assert loaded.calibration.is_anomalous(scores).sum() == 30 - loaded.calibration.rank
    assert (loaded.calibration.p_values(scores) >= model.calibration.p_values(scores)).all()
    loaded.save(file)  # now it is one of today's
    np.testing.assert_array_equal(load_inspection(file).calibration.scores, loaded.calibration.scores)
    kept = Calibration(lower.scores, 0.1, None, "k-fold", 3)
    model.with_calibration(kept).save(file)
    np.testing.assert_array_equal(load_inspection(file).calibration.scores, kept.scores)


def test_rounding_keeps_28_bits_and_what_is_no_number() -> None:
    double = torch.float64
    result = rounded(torch.tensor([1 + 2.0**-27, 1 + 2.0**-30, 3 - 2.0**-40, -(1 + 2.0**-30)], dtype=double))
    assert result.tolist() == [1 + 2.0**-27, 1.0, 3.0, -1.0]
    odd = torch.tensor([0.0, 1.7e308, np.inf, -np.inf, np.nan], dtype=double)
    torch.testing.assert_close(rounded(odd), odd, rtol=0, atol=0, equal_nan=True)
