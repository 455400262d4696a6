"""Images of different shapes are laid into one frame where that shows more in common: geometry, fits, files, graphs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastmaf
from fastmaf.images.dataset import load_train
from fastmaf.images.decode import resized
from fastmaf.inspection.detector import Detector
from fastmaf.inspection.export.export_onnx import export_onnx
from fastmaf.inspection.framed import FramedModel, seen_by
from fastmaf.inspection.framing import framing_of
from fastmaf.inspection.letterbox import Extent, Letterbox, letterboxed, maps_of_images
from fastmaf.inspection.model import InspectionModel, load_inspection
from fastmaf.inspection.posed import PosedModel
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.scoring.settings import AnomalyMapConfig, ScoreSettings
from fastmaf.inspection.workflow.evaluate import evaluate
from fastmaf.inspection.workflow.fit import fit
from fastmaf.inspection.workflow.load import _for_aspect
from fastmaf.io.tensor_file import read_tensors, write_tensors
from tests.inspection.tiny import silent
from tests.inspection.turned_objects import SIDE, objects

RECIPE = Recipe(32, rank=12, blocks=0, folds=3, score=ScoreSettings(), map_config=AnomalyMapConfig())
CUT = 10  # rows that some images lack above and below

pytestmark = pytest.mark.filterwarnings("ignore:a false-alarm rate of:UserWarning")


def turned(n: int, seed: int, angle: float = 0.0) -> np.ndarray:
    """Images of an object, uint8 ``[n, SIDE, SIDE, 3]``, at angles up to this one."""
    generator = torch.Generator().manual_seed(seed)
    angles = angle * torch.rand(n, generator=generator, dtype=torch.float64)
    return np.ascontiguousarray(objects(angles, torch.zeros(n, 2), seed).permute(0, 2, 3, 1).numpy())


def cut(images: np.ndarray, every: int = 2) -> list[np.ndarray]:
    """The same, of which some lack background above and below."""
    return [image if i % every else image[CUT:-CUT] for i, image in enumerate(images)]


def with_spots(images: np.ndarray) -> np.ndarray:
    images = images.copy()
    images[:, 29:34, 36:41] = 255
    return images


def squares(images: list[np.ndarray], size: int) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    return torch.stack([resized(image, size) for image in images]), [image.shape[:2] for image in images]


def test_extents() -> None:
    inside, native = Letterbox(400, 300, True), Letterbox(400, 300, False)
    assert inside.extent((400, 300), 64) == native.extent((400, 300), 64) == Extent(0, 0, 64, 64)
    assert inside.extent((300, 300), 64) == native.extent((300, 300), 64) == Extent(8, 0, 48, 64)
    assert inside.extent((200, 150), 64) == Extent(0, 0, 64, 64)
    assert native.extent((200, 150), 64) == Extent(16, 16, 32, 32)
    assert native.extent((4000, 300), 64) == inside.extent((4000, 300), 64) == Extent(0, 29, 64, 6)
    assert native.extent((1, 1), 8) == Extent(3, 3, 1, 1)
    assert inside.aspect == pytest.approx(4 / 3) and Letterbox(100, 103, True).aspect == 1


def test_images_are_not_distorted_and_repeat_their_border() -> None:
    (whole,) = turned(1, 0)
    pixels, shapes = squares([whole[CUT:-CUT]], SIDE)
    found = letterboxed(pixels, shapes, Letterbox(SIDE, SIDE, False))[0].permute(1, 2, 0).numpy()
    difference = np.abs(found[CUT:-CUT].astype(int) - whole[CUT:-CUT])
    assert difference.mean() < 3 and np.quantile(difference, 0.9) < 8  # resized twice
    assert (found[:CUT] == found[CUT]).all() and (found[-CUT:] == found[-CUT - 1]).all()
    assert len(letterboxed(pixels[:0], [], Letterbox(5, 5, True))) == 0


def test_maps_are_those_of_the_images_alone() -> None:
    maps = np.zeros((2, 40, 40), np.float32)
    maps[:, :10] = 9.0  # beyond the image
    maps[:, 10:30] = np.linspace(0, 1, 20, dtype=np.float32)[:, None]
    found = maps_of_images(maps, [(20, 40), (40, 40)], Letterbox(40, 40, True))
    assert found.shape == maps.shape and (found[1] == maps[1]).all()
    assert found[0].max() <= 1 and (np.diff(found[0], axis=0) >= 0).all() and found[0, 0, 0] == 0 < found[0, 39, 0]


def test_a_frame_is_used_where_it_shows_more_in_common() -> None:
    images = turned(24, 1)
    framing = framing_of(*squares(cut(images), 64), Recipe())
    assert framing is not None and framing.box == Letterbox(SIDE, SIDE, False) and "one frame" in framing.reason
    assert framing_of(*squares(list(images), 64), Recipe()) is None
    assert framing_of(*squares(cut(images), 64), Recipe(aspect=1.0)) is None
    # What differs in its proportions is more alike when it is resized to one shape.
    stretched = [
        np.asarray(Image.fromarray(image).resize((SIDE, SIDE + 8 * (i % 5)))) for i, image in enumerate(images)
    ]
    assert framing_of(*squares(stretched, 64), Recipe()) is None
    noise = [np.random.default_rng(i).integers(0, 256, (40 + i, 60, 3), dtype=np.uint8) for i in range(24)]
    assert framing_of(*squares(noise, 64), Recipe(), is_object=True) is None


def test_a_frame_for_objects_at_any_angle_is_a_square() -> None:
    tall = [np.concatenate([image, image[-1:].repeat(16, axis=0)]) for image in turned(30, 2, 360.0)]
    framing = framing_of(*squares(tall, 80), Recipe())
    assert framing is not None and framing.box == Letterbox(80, 80, False) and "turned to one pose" in framing.reason
    assert framing_of(*squares(tall, 80), Recipe(pose="none")) is None
    stripes = np.random.default_rng(0).integers(0, 256, (30, 60, 1, 1)).repeat(90, axis=2).repeat(3, axis=3)
    assert framing_of(*squares(list(stripes.astype(np.uint8)), 64), Recipe()) is None


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cut")
    sets = {"train/good": turned(30, 3), "test/good": turned(8, 4), "test/spot": with_spots(turned(8, 5))}
    for place, images in sets.items():
        (root / place).mkdir(parents=True)
        for i, image in enumerate(cut(images)):
            Image.fromarray(image).save(root / place / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    result = fit(data, out, RECIPE, kind="auto", keep_folds=True, progress=False, say=silent)
    assert isinstance(result.model, FramedModel) and "kind: object (the mean image" in result.describe()
    return out


def test_fit_and_evaluation(run: Path, data: Path, tmp_path: Path) -> None:
    model = load_inspection(run)
    assert isinstance(model, FramedModel) and isinstance(seen_by(model), InspectionModel)
    result = evaluate(run, data, tmp_path / "eval", progress=False, say=silent)
    assert result.rows[0].auroc > 0.95 and any("folds" in row.name for row in result.rows)
    good, shapes = squares(cut(turned(6, 6)), model.size)
    bad, _ = squares(cut(with_spots(turned(6, 6))), model.size)
    normal, found = model.predict(good, shapes), model.predict(bad, shapes)
    assert (found.scores > normal.scores).all() and np.isfinite(found.nll).all()
    for i, one in enumerate(found.anomaly_maps):
        top, height = (0, SIDE) if i % 2 else (CUT, SIDE - 2 * CUT)
        row, column = (side + 0.5 for side in np.unravel_index(one.argmax(), one.shape))
        assert abs(row * height / model.size + top - 31.5) < 5 and abs(column * SIDE / model.size - 38.5) < 5
    alone = [model.predict(bad[i : i + 1], shapes[i : i + 1]) for i in range(6)]
    assert (found.scores == np.concatenate([each.scores for each in alone])).all()
    with pytest.raises(ValueError, match="shapes must hold that of each of 6 images; found 2"):
        model.predict(bad, shapes[:2])
    assert len(model.predict(good[:0])) == 0 and len(model.predict(good)) == 6


def test_the_graph_lays_images_into_the_frame(run: Path, tmp_path: Path) -> None:
    model = load_inspection(run)
    shapes = [(SIDE, SIDE), (44, 64), (30, 100), (100, 30), (20, 20), (7, 3), (90, 120)]
    images = [np.array(Image.fromarray(image).resize(shape)) for shape, image in zip(shapes, turned(7, 7), strict=True)]
    for box in (model.box, Letterbox(60, 80, True)):
        report = export_onnx(replace(model, box=box), tmp_path / "model.onnx", images)
        assert report.images == 7 and report.score <= 1e-4 and report.map <= 1e-4


def test_the_detector_frames_and_turns(tmp_path: Path) -> None:
    images = [image[8:-8] for image in turned(30, 8, 360.0)]
    detector = Detector(size=32, rank=12, blocks=0, folds=3).fit(images)
    model = detector.model_
    assert isinstance(model, FramedModel) and isinstance(model.part, PosedModel) and detector.sizes_ == (32,)
    detector.save(tmp_path / "m.safetensors", card=tmp_path / "card.md")
    assert "laid into a frame of 64 × 64 pixels" in (tmp_path / "card.md").read_text("utf-8")
    again = Detector.load(tmp_path / "m.safetensors")
    assert (again.anomaly_score(images[:3]) == detector.anomaly_score(images[:3])).all()
    report = export_onnx(model, tmp_path / "m.onnx", [image[8:-8] for image in turned(3, 10, 360.0)])
    assert report.score <= 1e-3 and report.map <= 1e-3
    sizes = Detector(size="auto", rank=12, blocks=0, folds=3).fit(cut(turned(24, 9)))
    assert isinstance(sizes.model_, FramedModel) and sizes.anomaly_map(cut(turned(2, 9))).shape[0] == 2


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"kind": "framed", "height": 0, "width": 3, "enlarges": true}', "height"),
        ('{"kind": "framed", "height": 4, "width": 3}', "enlarges"),
    ],
)
def test_damaged_files_are_refused(run: Path, tmp_path: Path, record: str, message: str) -> None:
    tensors, texts = read_tensors(run / "model.safetensors")
    write_tensors(tensors, tmp_path / "m.safetensors", texts | {"inspection": record})
    with pytest.raises(fastmaf.CheckpointError, match=message):
        load_inspection(tmp_path / "m.safetensors")


def test_the_report_shows_images_as_the_model_sees_them(run: Path, data: Path) -> None:
    """A map of the frame lies on the picture of the frame, not on that of the file."""
    from fastmaf.inspection.report.build import _exhibit

    model = load_inspection(run)
    assert isinstance(model, FramedModel)
    images = load_train(data, size=model.size, progress=False)
    seen = model.seen(images.pixels, images.shapes)
    maps = model.part.predict(seen).anomaly_maps
    exhibit = _exhibit(model.part, images, 0, 0.0, 1.0, maps[0], pixels=seen)
    height, width = maps.shape[1:]
    assert exhibit.image.shape[:2] == exhibit.overlay.shape[:2]
    assert exhibit.image.shape[0] / exhibit.image.shape[1] == pytest.approx(height / width, rel=0.03)
    small = torch.nn.functional.interpolate(seen[:1].float(), exhibit.image.shape[:2], mode="bilinear")
    shown = torch.from_numpy(exhibit.image.copy()).permute(2, 0, 1)[None].float()
    assert float((small - shown).abs().mean()) < 3


def test_textures_have_no_frame(data: Path) -> None:
    images = load_train(data, size=32, progress=False)
    framings = [_for_aspect(Recipe(32), images, kind, print)[1] for kind in ("object", "texture")]
    assert framings[0] is not None and framings[1] is None
