"""Objects and textures: which kind of model a fit takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fastmaf
from fastmaf.images.dataset import load_train
from fastmaf.inspection.kinds import Kind, describe_choice, fit_texture_model, plausible_kind
from fastmaf.inspection.model import InspectionModel, load_inspection
from fastmaf.inspection.sizes import fit_sizes
from fastmaf.inspection.texture.candidate import TextureCandidate
from fastmaf.inspection.texture.model import TextureModel
from fastmaf.inspection.workflow.fit import fit as fit_folder
from tests.inspection.texture.conftest import SIDE, candidate, grain, texture
from tests.inspection.tiny import TINY, silent

__all__ = ["candidate", "texture"]

SMALL = replace(TINY, size=16, folds=2, blocks=0)


def test_images_with_the_same_structure_are_those_of_an_object(data: Path, texture: torch.Tensor) -> None:
    kind, reason = plausible_kind(load_train(data, size=32, progress=False).pixels)
    assert kind == "object" and "they show the same thing at the same place" in reason
    kind, reason = plausible_kind(texture)
    assert kind == "auto" and "explains 0% of the fine structure, less than 25%" in reason
    kind, reason = plausible_kind(texture[:19])
    assert kind == "object" and "at least 20 good images" in reason


def test_a_texture_is_compared_with_models_of_pixels(candidate: TextureCandidate, texture: torch.Tensor) -> None:
    result = fit_sizes(texture, (16,), SMALL, others=[candidate], progress=False)
    areas = result.model.about["drawn_auroc_of_candidates"]
    assert {"16 pixels", "texture"} <= set(areas) and areas["texture"] > areas["16 pixels"]
    assert result.model.size == SIDE and "texture" in result.model.about["chosen"]
    assert describe_choice(result.model, "why").startswith(("texture (why; image AUROC", "object and texture (why"))
    with pytest.raises(ValueError, match="sizes must ascend to 48"):
        fit_sizes(texture, (16,), SMALL, progress=False)


def test_a_texture_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "good"
    folder.mkdir()
    for i, image in enumerate(grain(20, 2)):
        Image.fromarray(image[0, : 48 - i % 3].numpy()).save(folder / f"{i:02}.png")
    result = fit_folder(folder, tmp_path / "run", SMALL, kind="texture", progress=False, say=silent)
    assert "20 good images as a texture; held-out NLL of a location" in result.describe()
    assert set(result.summary()) >= {"held_out_nll", "levels", "calibration", "files"}
    model = load_inspection(tmp_path / "run")
    assert isinstance(model, TextureModel) and model.calibration.n == 20
    assert (tmp_path / "run" / "report.html").exists()
    detector = fastmaf.Detector.load(tmp_path / "run" / "model.safetensors")
    assert detector.kind == "texture"
    files = sorted(folder.iterdir())
    alone = model.predict(
        load_train(folder, size=model.size, progress=False).pixels[:3], [(48, 48), (47, 48), (46, 48)]
    )
    np.testing.assert_array_equal(detector.anomaly_score(files[:3]), alone.scores)


def test_groups_are_held_out_together(texture: torch.Tensor) -> None:
    groups = [str(i // 8) for i in range(len(texture))]
    fitted = fit_texture_model(texture, SMALL, groups=groups, progress=False)
    for fold in fitted.candidate.folds:
        inside = {groups[i] for i in fold}
        assert all(i in fold for i, group in enumerate(groups) if group in inside)
    assert "3 groups" in fitted.model.about["groups"] and fitted.log == []


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of 'auto', 'object', 'texture'; found 'thing'"):
        fastmaf.Detector(kind="thing").fit(np.zeros((3, 8, 8, 3), np.uint8))  # type: ignore[arg-type]


class Contrast(nn.Module):
    """Mean and contrast of squares of 32 pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, square = (nn.functional.avg_pool2d(values, 32) for values in (x, x.square()))
        return torch.cat([mean, (square - mean.square()).clamp_min(0).sqrt()], dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["auto", "texture"])
def test_a_detector_with_features_of_a_texture(kind: Kind, texture: torch.Tensor) -> None:
    images = texture.permute(0, 2, 3, 1).numpy()
    options: Any = {"size": 16, "rank": 6, "blocks": 0, "folds": 3}
    detector = fastmaf.Detector(features=Contrast(), kind=kind, **options).fit(images)
    compared = detector.model_.about["drawn_auroc_of_candidates"]
    assert any("texture" in name for name in compared) and any("16 pixels" in name for name in compared)
    plain = fastmaf.Detector(features=Contrast(), **options).fit(images)
    assert not any("texture" in name for name in plain.model_.about["drawn_auroc_of_candidates"])
    scores = detector.anomaly_score(images[:4])
    assert scores.shape == (4,) and detector.anomaly_map(images[:4]).shape == (4, 256, 256)
    np.testing.assert_array_equal(detector.anomaly_score(images[2:4]), scores[2:])


@pytest.mark.slow
def test_a_detector_chooses_the_kind(texture: torch.Tensor) -> None:
    options: Any = {"size": 16, "rank": 6, "blocks": 0, "folds": 3, "kind": "auto"}
    detector = fastmaf.Detector(**options).fit(texture.permute(0, 2, 3, 1).numpy())
    assert "texture" in detector.model_.about["chosen"]
    defective = texture[:2].clone()
    defective[:, :, 20:26, 20:26] = 250
    images = defective.permute(0, 2, 3, 1).numpy()
    assert (detector.anomaly_score(images) > detector.decision_scores_[:2]).all()
    parts = np.repeat(images[:1], 20, axis=0)  # the same image again
    assert isinstance(fastmaf.Detector(**options).fit(parts).model_, InspectionModel)
