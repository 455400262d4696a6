"""OpenVINO runs the exported graph, where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmaf.images.dataset import load_test
from fastmaf.inspection.export.graph import inspection_graph
from fastmaf.inspection.fit import fit
from fastmaf.inspection.model import load_inspection
from fastmaf.inspection.recipe import Recipe
from tests.inspection.tiny import TINY, waves


def outputs_in_float32(graph: Any, file: Path, images: np.ndarray) -> list[dict[str, np.ndarray]]:
    """The outputs for each image, by name."""
    openvino: Any = pytest.importorskip("openvino")
    file.write_bytes(graph.SerializeToString())
    core = openvino.Core()
    # Without the hint, processors with bfloat16 units compute in bfloat16.
    compiled = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    batched = len(compiled.input(0).partial_shape) == 4
    results = []
    for image in images:
        result = compiled(image[None] if batched else image)
        results.append({name: value.squeeze() for output, value in result.items() for name in output.names})
    return results


@pytest.mark.slow  # imports and compiles for seconds
def test_openvino_in_float32_agrees(run: Path, data: Path, tmp_path: Path) -> None:
    model, test = load_inspection(run), load_test(data, size=16, progress=False)
    expected = model.predict(test.pixels)
    images = np.ascontiguousarray(test.pixels.permute(0, 2, 3, 1).numpy())
    found = outputs_in_float32(inspection_graph(model), tmp_path / "model.onnx", images)
    for i, outputs in enumerate(found):
        assert outputs["score"] == pytest.approx(expected.scores[i], rel=1e-3)
        np.testing.assert_allclose(outputs["map"], expected.anomaly_maps[i], atol=1e-3 * model.map_levels[1])
        assert bool(outputs["anomalous"]) == bool(model.calibration.is_anomalous(expected.scores[i : i + 1])[0])


@pytest.mark.slow
def test_openvino_reads_the_graph_of_a_grey_model_without_blocks(tmp_path: Path) -> None:
    pixels = waves(24).float().mean(dim=1, keepdim=True).expand(-1, 3, -1, -1).byte().contiguous()
    recipe = Recipe(16, 10, blocks=0, folds=3, score=TINY.score, map_config=TINY.map_config)
    model = fit(pixels, recipe, progress=False).model
    assert model.channels == 1
    images = np.ascontiguousarray(pixels[:3].permute(0, 2, 3, 1).numpy())
    for outputs, score in zip(
        outputs_in_float32(inspection_graph(model), tmp_path / "model.onnx", images),
        model.scores(pixels[:3]),
        strict=True,
    ):
        assert outputs["score"] == pytest.approx(score, rel=1e-3)
