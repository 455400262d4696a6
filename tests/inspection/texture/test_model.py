"""Texture models: scores, maps, calibration and files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastmaf
from fastmaf.inspection.export.export_onnx import export_onnx
from fastmaf.inspection.export.graph_builder import ExportError
from fastmaf.inspection.model_file import load_inspection
from fastmaf.inspection.texture.candidate import TextureCandidate
from fastmaf.inspection.texture.density import without_blocks
from fastmaf.inspection.texture.model import TextureModel, nll_maps
from fastmaf.io.tensor_file import read_tensors, write_tensors
from tests.inspection.texture.conftest import IMAGES, SHAPES, SIDE, grain


def test_a_scratch_across_the_grain_is_found_where_it_is(candidate: TextureCandidate) -> None:
    model, good = candidate.model(), grain(8, 1)
    bad = good.clone()
    bad[:, :, 10:30, 20:23] = 40
    normal, defect = model.predict(good), model.predict(bad)
    assert defect.scores.min() > normal.scores.max()
    assert model.calibration.is_anomalous(defect.scores).all()
    inside = defect.anomaly_maps[:, 10:30, 20:23].mean(axis=(1, 2))
    outside = defect.anomaly_maps[:, :, 32:].mean(axis=(1, 2))
    assert (inside > 3 * outside).all()


def test_the_calibration_scores_are_those_of_held_out_images(
    candidate: TextureCandidate, texture: torch.Tensor
) -> None:
    held, model = candidate.held_out([texture]), candidate.model()
    np.testing.assert_array_equal(np.sort(held.scores[0]), model.calibration.scores)
    assert held.maps.shape == (1, IMAGES, SIDE, SIDE)
    assert np.square(held.maps, dtype=np.float64).mean() == pytest.approx(1, rel=1e-5)
    assert model.calibration.how == "k-fold" and model.calibration.folds == 2 and model.about["images"] == IMAGES


def test_blocks_are_kept_where_held_out_features_are_more_likely(candidate: TextureCandidate) -> None:
    model = candidate.model()
    figures, kept = model.about["texture_levels"], model.about["texture_blocks"]
    assert kept == [n for n, v in figures.items() if v["held_out_nll"] < v["held_out_nll_of_whitening"]]
    for i, flow in enumerate(model.flows):
        assert (len(flow.transforms) > 1) == (f"level {i}" in kept)
        assert all((len(of_fold[i].transforms) > 1) == (f"level {i}" in kept) for of_fold in candidate.flows)


def test_results_do_not_depend_on_the_batch_but_on_the_shape(
    candidate: TextureCandidate, texture: torch.Tensor
) -> None:
    model, whole = candidate.model(), candidate.model().predict(texture, SHAPES)
    for i in range(2):
        one = model.predict(texture[i : i + 1], SHAPES[i : i + 1])
        np.testing.assert_array_equal(one.scores, whole.scores[i : i + 1])
    assert model.predict(texture[1:2]).scores != whole.scores[1:2]
    assert len(model.predict(texture[:0])) == 0
    with pytest.raises(ValueError, match=r"uint8 \[n, 3, 48, 48\]"):
        model.predict(texture[..., :32, :32])
    with pytest.raises(ValueError, match="shapes must hold that of each of 24 images; found 1"):
        model.predict(texture, SHAPES[:1])


def test_an_export_is_refused_with_what_to_do(
    candidate: TextureCandidate, texture: torch.Tensor, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="or fit with --kind object"):
        export_onnx(candidate.model(), tmp_path / "m.onnx", [texture[0].permute(1, 2, 0).numpy()])
    assert not (tmp_path / "m.onnx").exists()


@pytest.fixture()
def file(candidate: TextureCandidate, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    candidate.model().save(path, card=tmp_path / "card.md")
    return path


def test_saved_and_loaded(candidate: TextureCandidate, texture: torch.Tensor, file: Path) -> None:
    model, loaded = candidate.model(), load_inspection(file)
    assert isinstance(loaded, TextureModel) and loaded.about == model.about and loaded.map_levels == model.map_levels
    expected, found = model.predict(texture[:4], SHAPES[:4]), loaded.predict(texture[:4], SHAPES[:4])
    for name in ("scores", "anomaly_maps", "nll"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert np.array_equal(loaded.calibration.scores, model.calibration.scores)
    assert "| Levels with blocks |" in (file.parent / "card.md").read_text("utf-8")
    assert sorted(path.name for path in file.parent.iterdir()) == ["card.md", "model.safetensors"]


def test_files_of_earlier_versions_are_read(candidate: TextureCandidate, texture: torch.Tensor, file: Path) -> None:
    model = candidate.model()
    flows = tuple(without_blocks(flow.transforms[0]) for flow in model.flows)  # type: ignore[arg-type]
    earlier = replace(model, filters=replace(model.filters, light=None), flows=flows)
    earlier.save(file)
    tensors, metadata = read_tensors(file)
    record = json.loads(metadata["inspection"])
    assert record.pop("light") is False and "light" not in tensors
    write_tensors(tensors, file, {**metadata, "inspection": json.dumps(record)})
    loaded = load_inspection(file)
    assert isinstance(loaded, TextureModel) and loaded.filters.light is None and loaded.filters.border == 0
    np.testing.assert_array_equal(loaded.predict(texture[:2]).scores, earlier.predict(texture[:2]).scores)
    levels = nll_maps(loaded.filters, loaded.flows, texture[0], None)
    assert levels[0].shape == (SIDE // 2, SIDE // 2)  # with the border
    assert nll_maps(model.filters, model.flows, texture[0], None)[0].shape == (SIDE // 2 - 4, SIDE // 2 - 4)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("light", lambda t: 0 * t, "light: expected deviations of at least"),
        ("light", lambda t: t[:1], "light: expected"),
        ("filter_bias", lambda t: t[:, :0], "filter_bias: expected"),
        ("filter_weight", lambda t: t[..., :-1], "filters of 1 or 3 x 5² values; found 24"),
        ("filter_weight", lambda t: t * float("nan"), "filter_weight: expected finite numbers"),
        ("position_deviation", lambda t: 0 * t, "position_deviation: expected numbers of at least"),
        ("part_mean", lambda t: t.float(), "part_mean: expected .* torch.float64"),
        ("calibration_scores", lambda t: t.float(), "calibration_scores: expected torch.float64"),
    ],
)
def test_damaged_tensors_are_refused(file: Path, name: str, change: Any, message: str) -> None:
    tensors, metadata = read_tensors(file)
    tensors[name] = change(tensors[name]).contiguous()
    write_tensors(tensors, file, metadata)
    with pytest.raises(fastmaf.CheckpointError, match=message):
        load_inspection(file)


@pytest.mark.parametrize(
    ("changes", "message"), [({"size": 0}, "inspection.size"), ({"map_unit": 0.0}, "map_unit"), ({"more": 1}, "more")]
)
def test_damaged_records_are_refused(file: Path, changes: dict[str, Any], message: str) -> None:
    tensors, metadata = read_tensors(file)
    record = {**json.loads(metadata["inspection"]), **changes}
    write_tensors(tensors, file, {**metadata, "inspection": json.dumps(record)})
    with pytest.raises(fastmaf.CheckpointError, match=message):
        load_inspection(file)


def test_a_flow_of_other_features_is_refused(file: Path) -> None:
    tensors, metadata = read_tensors(file)
    fastmaf.Flow(3, [fastmaf.GaussianWhitening(3, 1)]).save(file.parent / "other.safetensors")
    others, texts = read_tensors(file.parent / "other.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("1/")}
    kept |= {f"1/{name}": tensor for name, tensor in others.items()}
    texts = {f"1/{key}": text for key, text in texts.items()}
    write_tensors(kept, file, {**{k: v for k, v in metadata.items() if not k.startswith("1/")}, **texts})
    with pytest.raises(fastmaf.CheckpointError, match="flow of level 1: expected 24 features and a context of 6"):
        load_inspection(file)
