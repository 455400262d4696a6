"""A MAF of whitened features, given their position: where it is kept, its likelihood, file and graph."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf.inspection.features import conditional
from fastmaf.inspection.features.candidate import FeatureCandidate, fit_precomputed
from fastmaf.inspection.features.conditional import positions, with_maf
from fastmaf.inspection.features.gaussian import fit_gaussians
from fastmaf.inspection.features.model import FeatureModel
from fastmaf.inspection.model import load_inspection
from fastmaf.inspection.out_of_fold import k_fold
from fastmaf.inspection.workflow.export import export
from fastmaf.io.tensor_file import read_tensors, write_tensors
from fastmaf.transforms import fallback
from tests.inspection.tiny import silent


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A short training, of few images."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, value in {"_LEAST": 100, "_STEPS": 80, "_LR": 4e-2, "_HIDDEN": 32}.items():
        monkeypatch.setattr(conditional, name, value)
    yield
    torch.set_num_threads(before)


def curved(n: int = 60) -> Tensor:
    """Three channels, of which the second is the square of the first, at 4 x 4 locations."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, 16, generator=generator)
    x[:, 1] = x[:, 0].square() + 0.1 * x[:, 1]
    return x


def test_it_is_kept_where_held_out_images_are_more_likely() -> None:
    """And its likelihood is that of the Gaussian and the flow."""
    x, folds = curved(), k_fold(60, 4)
    gaussians = fit_gaussians(x, folds, pooled=True)
    found = with_maf(x, folds, gaussians, (4, 4), 0)
    assert found is not None and found.whole.flow is not None
    for fold, before, after in zip(folds, gaussians.folds, found.folds, strict=True):
        held_out = x[torch.from_numpy(fold)]
        assert after.nll(after.distances(held_out)).mean() < before.nll(before.distances(held_out)).mean()
    density, expected = found.whole, np.zeros(5)
    nll = density.nll(density.distances(x[:5])).numpy()
    factor = density.factor[0].double()
    for place, context in enumerate(positions((4, 4))):
        z = (x[:5, :, place].double() - density.mean[0].double()) @ factor.T
        log_prob = found.whole.flow.double().log_prob(z, context.double().expand(5, 2))
        expected -= (log_prob + torch.logdet(factor)).numpy()
    np.testing.assert_allclose(nll, expected, rtol=1e-5)


def test_it_is_dropped_where_they_are_not() -> None:
    normal, folds = torch.randn(60, 3, 16, generator=torch.Generator().manual_seed(1)), k_fold(60, 4)
    assert with_maf(normal, folds, fit_gaussians(normal, folds, pooled=True), (4, 4), 0) is None


def test_few_images_do_not_support_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditional, "_LEAST", 60 * 16 + 1)
    x, folds = curved(), k_fold(60, 4)
    assert with_maf(x, folds, fit_gaussians(x, folds, pooled=True), (4, 4), 0) is None


def test_positions() -> None:
    assert positions((2, 3)).tolist() == [[-1, -1], [-1, 0], [-1, 1], [1, -1], [1, 0], [1, 1]]
    assert positions((1, 1)).tolist() == [[0, 0]] and math.isfinite(float(positions((16, 1)).sum()))


@pytest.fixture
def model(candidate: FeatureCandidate) -> FeatureModel:
    """A model of features with a MAF that was not trained."""
    fitted = candidate.model()
    channels = fitted.gaussian.mean.shape[1]
    flow = fastmaf.MAF(channels, blocks=1, hidden_features=(16,), context_features=2, seed=0).eval()
    gaussian = replace(fitted.gaussian, flow=flow.requires_grad_(False), positions=positions(fitted.grid))
    return replace(fitted, gaussian=gaussian)


def test_saved_and_loaded(model: FeatureModel, pixels: Tensor, tmp_path: Path) -> None:
    model.save(tmp_path / "m.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
    expected, found = model.predict(pixels[:3]), load_inspection(tmp_path / "m.safetensors").predict(pixels[:3])
    for name in ("scores", "anomaly_maps", "nll"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_a_flow_of_another_shape_is_refused(model: FeatureModel, tmp_path: Path) -> None:
    other = fastmaf.MAF(5, blocks=1, hidden_features=(16,), seed=0)
    replace(model, gaussian=replace(model.gaussian, flow=other)).save(tmp_path / "m.safetensors")
    with pytest.raises(fastmaf.CheckpointError, match="176 features and 2 context features; found 5 features and 0"):
        load_inspection(tmp_path / "m.safetensors")
    tensors, metadata = read_tensors(tmp_path / "m.safetensors")
    write_tensors(tensors, tmp_path / "m.safetensors", {k: v for k, v in metadata.items() if k != "flow/fastmaf"})
    with pytest.raises(fastmaf.CheckpointError):
        load_inspection(tmp_path / "m.safetensors")


def test_the_graph_agrees(data: Path, model: FeatureModel, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model.save(tmp_path / "m.safetensors")
    assert "agree on 10 images" in export(
        tmp_path / "m.safetensors", tmp_path / "m.onnx", [str(data / "test")], say=silent
    )


def test_a_candidate_with_one_gaussian_takes_it() -> None:
    candidate = fit_precomputed(curved().unflatten(2, (4, 4)))
    assert candidate.figures["features"]["gaussian"] == "for all locations, then a MAF"
    nll = candidate.figures["held_out_nll_of_gaussians"]
    assert min(nll, key=lambda kind: nll[kind]) == "for all locations, then a MAF" and len(nll) == 3
    assert candidate.model().gaussian.flow is not None


def test_it_is_trained_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "_given", False)
    monkeypatch.setattr(conditional, "_STEPS", 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conditional._trained(torch.randn(5, 4, 3), np.arange(5), conditional.positions((2, 2)), seed=0)
