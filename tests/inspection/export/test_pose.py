"""The pose in the ONNX graph is that of fastmaf, and a model of turned objects gives the same results in it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from fastmaf.images.decode import resized as resized_file
from fastmaf.images.reduce import reduced
from fastmaf.inspection.export.export_onnx import export_onnx
from fastmaf.inspection.export.graph import inspection_graph
from fastmaf.inspection.export.graph_builder import Graph
from fastmaf.inspection.export.pose import place_of
from fastmaf.inspection.fit import fit
from fastmaf.inspection.pose import Pose, turned
from fastmaf.inspection.posed import PosedModel
from fastmaf.inspection.recipe import Recipe
from tests.inspection.turned_objects import SIDE, objects

RECIPE = Recipe(32, rank=20, blocks=0, folds=2)
ANGLES = torch.linspace(3, 351, 24, dtype=torch.float64)
SHIFTS = 0.05 * torch.randn(24, 2, generator=torch.Generator().manual_seed(1))


@lru_cache
def posed(moves: bool, size: int) -> PosedModel:
    pixels = objects(ANGLES, SHIFTS if moves else 0 * SHIFTS)
    pose = Pose.of(pixels, moves)
    images = reduced(turned(pixels, pose.places(pixels)), 32)
    return PosedModel(pose, fit(images, RECIPE, progress=False).model, size)


def session_of(proto: object) -> onnxruntime.InferenceSession:
    serialised = proto.SerializeToString()  # type: ignore[attr-defined]
    return onnxruntime.InferenceSession(serialised, providers=["CPUExecutionProvider"])


def images_last(pixels: Tensor) -> np.ndarray:
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("side", [SIDE, 40, 1])
def test_places_are_those_of_the_pose(moves: bool, side: int) -> None:
    pixels = objects(ANGLES + 1.7, 2 * SHIFTS, seed=5)
    pixels[3], pixels[4] = 77, torch.randint(0, 256, (3, SIDE, SIDE), generator=torch.Generator().manual_seed(2))
    pixels = reduced(pixels, side)
    pose, graph = posed(moves, SIDE).pose, Graph()
    place = place_of(pose, graph.input("x", "float64", ["n", 3, side, side], ""), side)
    for name, value in place._asdict().items():
        graph.output(name, value, ["n", 1], "")
    found = session_of(graph.model("place", "", {}, "0")).run(None, {"x": pixels.double().numpy()})
    angle, right, below = pose.places(pixels).T
    expected = torch.deg2rad(angle).cos(), torch.deg2rad(angle).sin(), right, below
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(other[:, 0], one.numpy(), rtol=0, atol=1e-12)
    assert moves == bool((right != 0).any()) or side == 1


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("size", [SIDE, 32])
def test_results_are_those_of_the_model(moves: bool, size: int) -> None:
    model = posed(moves, size)
    session = session_of(inspection_graph(model))
    pixels = objects(ANGLES[:7] + 40.3, SHIFTS[:7], seed=3)
    pixels[2, :, 30:36, 30:36] = 255
    expected = model.predict(reduced(pixels, size))
    spread, levels = model.calibration.spread(), np.ptp(expected.anomaly_maps)
    for first, batch in ((0, 1), (1, 3), (4, 3)):
        part = slice(first, first + batch)
        score, maps, nll, p_value, anomalous = session.run(None, {"image": images_last(pixels[part])})
        np.testing.assert_allclose(score, expected.scores[part], rtol=0, atol=1e-3 * spread)
        np.testing.assert_allclose(maps, expected.anomaly_maps[part], rtol=0, atol=1e-3 * levels)
        np.testing.assert_allclose(nll, expected.nll[part], rtol=5e-5, atol=1e-3 * np.sqrt(3 * 32**2 / 2))
        np.testing.assert_allclose(p_value, model.calibration.p_values(score), rtol=0, atol=1e-12)
        assert (anomalous == model.calibration.is_anomalous(expected.scores[part])).all()
    assert expected.anomaly_maps[0, 0, 0] == 0 < expected.anomaly_maps[0].max()  # a corner that was turned out of view
    shapes = [output.shape for output in session.run(None, {"image": images_last(pixels[:0])})]
    assert shapes == [(0,), (0, size, size), (0,), (0,), (0,)]


def test_the_export_is_checked_on_images_of_any_size(tmp_path: Path) -> None:
    model = posed(True, SIDE)
    shapes = [(SIDE, SIDE), (150, 150), (80, 100), (33, 20), (5, 5)]
    images = [
        resized_file(image, shape).permute(1, 2, 0).contiguous().numpy()
        for image, shape in zip(images_last(objects(ANGLES[:5], SHIFTS[:5], seed=8)), shapes, strict=True)
    ]
    images.append(np.full((40, 40, 3), 200, np.uint8))
    report = export_onnx(model, tmp_path / "model.onnx", images)
    assert report.images == 6 and report.score <= 1e-3 and report.map <= 1e-3
