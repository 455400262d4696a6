"""The ONNX graph says what fastmaf says, from pixels to verdict, and a graph that does not is not left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor

import fastmaf
from fastmaf.images.dataset import to_unit
from fastmaf.images.decode import DataError, load_image
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.export import export_onnx as module
from fastmaf.inspection.export import resize
from fastmaf.inspection.export.export_onnx import export_onnx
from fastmaf.inspection.export.graph import inspection_graph
from fastmaf.inspection.export.graph_builder import ExportError, Graph
from fastmaf.inspection.export.resize import resized
from fastmaf.inspection.fit import fit
from fastmaf.inspection.model import InspectionModel
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.scoring.float64_flow import FlowValues
from fastmaf.inspection.scoring.score import TermStatistics, terms_of
from fastmaf.inspection.scoring.settings import AnomalyMapConfig, ScoreSettings

SIZE, D = 16, 3 * 16**2
SHAPES = [(SIZE, SIZE), (40, 33), (1000, 1000), (7, 5), (SIZE, 61), (60, 20), (1, 1), (90, 15), (15, 90)]


def pictures(n: int, shape: tuple[int, int] = (SIZE, SIZE), seed: int = 0) -> np.ndarray:
    """Smooth colour gradients with noise, uint8 [n, h, w, 3]."""
    generator = np.random.default_rng(seed)
    down, across = (np.linspace(0, 1, length) for length in shape)
    slopes = 90 + 20 * generator.standard_normal((n, 2, 1, 1, 3))
    plain = 20 + slopes[:, 0] * down[:, None, None] + slopes[:, 1] * across[:, None]
    noisy = plain + 8 * generator.standard_normal((n, *shape, 3))
    return noisy.clip(0, 255).astype(np.uint8)


NORMALS = torch.from_numpy(pictures(40)).permute(0, 3, 1, 2).contiguous()
CHECKS = [pictures(1, shape, seed)[0] for seed, shape in enumerate(SHAPES, 1)]


def whitening(rank: int = 6) -> fastmaf.GaussianWhitening:
    return fastmaf.GaussianWhitening(D, rank).fit_(to_unit(NORMALS), floor=1e-4)


def perturbed(*transforms: fastmaf.Transform, scale: float = 0.05) -> list[fastmaf.Transform]:
    """Blocks start as the identity: give them something to say."""
    generator = torch.Generator().manual_seed(3)
    for transform in transforms:
        for parameter in transform.parameters():
            parameter.data += scale * torch.randn(parameter.shape, generator=generator) * (parameter.dim() > 1)
    return list(transforms)


def model_of(transforms: list[fastmaf.Transform], settings: ScoreSettings | None = None) -> InspectionModel:
    flow, settings = fastmaf.Flow(D, transforms).eval().requires_grad_(False), settings or ScoreSettings()
    values = FlowValues(flow, to_unit(NORMALS))
    statistics = TermStatistics.of(terms_of(values, settings), values.nll)
    config = AnomalyMapConfig(factors=4, rms=1.3)  # fewer than the whitening has
    draft = InspectionModel(flow, settings, config, statistics, Calibration(np.arange(2.0), 0.1, None, "split"))
    return draft.with_calibration(Calibration(draft.predict(NORMALS).scores, 0.1, None, "split"))


def local(**options: Any) -> fastmaf.LocalAutoregressive:
    generator = torch.Generator().manual_seed(1)
    return fastmaf.LocalAutoregressive((3, SIZE, SIZE), generator=generator, **options)


def made_network(hidden: tuple[int, ...] = (24, 20), activation: str = "relu", strict: bool = True) -> fastmaf.MADE:
    generator = torch.Generator().manual_seed(2)
    return fastmaf.MADE(D, hidden, activation=activation, strict=strict, generator=generator)


def affine(**options: Any) -> fastmaf.AffineAutoregressive:
    bounds = {name: options.pop(name) for name in ("log_scale_bound", "soft_bound") if name in options}
    return fastmaf.AffineAutoregressive(made_network(**options), **bounds)


def shuffled() -> fastmaf.Permutation:
    return fastmaf.Permutation(torch.randperm(D, generator=torch.Generator().manual_seed(4)))


def stored_as(dtype: torch.dtype) -> list[fastmaf.Transform]:
    rounded = fastmaf.Flow(D, [whitening(), affine(log_scale_bound=2.0)]).to_inference(dtype)
    return [step for step in rounded.transforms if isinstance(step, fastmaf.Transform)]


FLOWS: dict[str, Callable[[], list[fastmaf.Transform]]] = {
    "whitening": lambda: [whitening()],
    "whitening without factors": lambda: [whitening(0)],
    "local": lambda: [whitening(), *perturbed(local(), local(reverse=True))],
    "local without hidden channels": lambda: [whitening(), *perturbed(local(hidden=0))],
    "local, other patch and kernel": lambda: [whitening(), *perturbed(local(patch=4, kernel=1, log_scale_bound=0.1))],
    "permutation": lambda: [whitening(), shuffled(), *perturbed(local()), shuffled()],
    "logit first": lambda: [fastmaf.Logit(D, 0.1), *perturbed(local())],
    "logit before the whitening": lambda: [fastmaf.Logit(D, 0.1), whitening(), *perturbed(local())],
    "affine, hard bound": lambda: [whitening(), affine(log_scale_bound=0.01)],
    "affine, soft bound": lambda: [whitening(), affine(log_scale_bound=0.3, soft_bound=True)],
    "affine, no bound": lambda: [whitening(), affine(hidden=(10,), activation="identity", log_scale_bound=None)],
    "affine, leaky": lambda: [whitening(), affine(strict=False)],
    "MAF": lambda: list(fastmaf.MAF(D, 3, (16,), seed=0).transforms),  # type: ignore[arg-type]
    "bfloat16 weights": lambda: stored_as(torch.bfloat16),
    "float8 weights": lambda: stored_as(torch.float8_e4m3fn),
}


def test_large_constants_are_stored_once() -> None:
    for name in ("affine, hard bound", "MAF"):
        proto = inspection_graph(model_of(FLOWS[name]()))
        large = [tensor.raw_data for tensor in proto.graph.initializer if len(tensor.raw_data) > 10_000]
        assert large and len(large) == len(set(large))


@pytest.mark.parametrize("source", ["pixels", "whitened", "flow"])
@pytest.mark.parametrize("name", FLOWS)
def test_every_transform(name: str, source: Any, tmp_path: Path) -> None:
    model = model_of(FLOWS[name](), ScoreSettings(source=source))
    report = export_onnx(model, tmp_path / "model.onnx", CHECKS)
    assert report.images == len(CHECKS) and report.bytes == (tmp_path / "model.onnx").stat().st_size
    assert report.score <= 1e-4 and report.map <= 1e-4
    assert not report.undecided


@pytest.mark.slow
@pytest.mark.parametrize("source", ["pixels", "whitened", "flow"])
@pytest.mark.parametrize("kind", ["nll", "typicality", "map maximum", "map top"])
@pytest.mark.parametrize("presmooth, top", [(0.0, 0.001), (0.7, 1.0)])
def test_every_score(kind: Any, source: Any, presmooth: float, top: float, tmp_path: Path) -> None:
    settings = ScoreSettings(kind=kind, source=source, presmooth_sigma=presmooth, top=top, sigma=1.3, clip=4.0)
    model = model_of([whitening(), *perturbed(local())], settings)
    report = export_onnx(model, tmp_path / "model.onnx", CHECKS)
    assert report.score <= 1e-4 and report.map <= 1e-4


def resize_session(size: int) -> onnxruntime.InferenceSession:
    graph = Graph()
    graph.output("y", resized(graph.input("image", "uint8", ["n", "h", "w", 3], ""), size), ["n", 3, size, size], "")
    proto = graph.model("resize", "", {}, "0")
    onnx.checker.check_model(proto, full_check=True)
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def in_graph(session: onnxruntime.InferenceSession, image: np.ndarray) -> np.ndarray:
    return session.run(None, {"image": image[None]})[0][0].transpose(1, 2, 0)


@pytest.mark.parametrize("size", [1, 5, 16, 33])
def test_resizing_is_that_of_pillow_bit_for_bit(size: int) -> None:
    session, generator = resize_session(size), np.random.default_rng(size)
    shapes = [*SHAPES, (size, size), (size + 1, size), (size, size + 1), (2 * size, 3), (3, 2 * size), (301, 2)]
    for shape in [*shapes, *map(tuple, generator.integers(1, 200, (60, 2)).tolist())]:
        image = generator.integers(0, 256, (*shape, 3), dtype=np.uint8)
        expected = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(in_graph(session, image), expected, err_msg=str(shape))


def test_order_of_passes_is_that_of_the_pillow_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).integers(0, 256, (90, 40, 3), dtype=np.uint8)
    picture, bilinear = Image.fromarray(image), Image.Resampling.BILINEAR
    for turns, between in ((False, (SIZE, 90)), (True, (40, SIZE))):
        monkeypatch.setattr(resize, "pillow_resizes_tall_images_vertically_first", lambda turns=turns: turns)
        expected = np.asarray(picture.resize(between, bilinear).resize((SIZE, SIZE), bilinear))
        np.testing.assert_array_equal(in_graph(resize_session(SIZE), image), expected)


def changed(model: InspectionModel, change: Callable[[onnx.TensorProto, np.ndarray], np.ndarray]) -> Any:
    proto = inspection_graph(model)
    for constant in proto.graph.initializer:
        array = change(constant, onnx.numpy_helper.to_array(constant).copy())
        constant.CopyFrom(onnx.numpy_helper.from_array(array, constant.name))
    return proto


def with_one_weight(_: onnx.TensorProto, array: np.ndarray) -> np.ndarray:
    """One number of the factors' first column is wrong."""
    if array.shape == (D, 6):
        array[100, 0] += 0.5
    return array


def with_other_calibration_scores(_: onnx.TensorProto, array: np.ndarray) -> np.ndarray:
    return array + 100 if array.shape == (40,) else array


def with_one_scale(_: onnx.TensorProto, array: np.ndarray) -> np.ndarray:
    """The scale of one dimension is 5% too large."""
    if array.shape == (D,) and array.dtype == np.float32 and array.min() > 0 and array.max() < 1:
        array[0] *= 1.05
    return array


@pytest.mark.parametrize(
    "change, what",
    [
        (with_one_weight, "score|map"),
        (with_other_calibration_scores, "p-value"),
        (with_one_scale, "score|map|NLL"),
    ],
)
@pytest.mark.parametrize("before", [None, b"\x08\x08\x12\x07fastmaf, an older export"])
def test_tampering_is_caught_and_leaves_nothing(
    change: Any, what: str, before: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.onnx"
    if before is not None:
        file.write_bytes(before)
    model = model_of([whitening()], ScoreSettings(level_power=0.0))
    monkeypatch.setattr(module, "inspection_graph", lambda given: changed(given, change))
    with pytest.raises(ExportError, match=rf"^check image 0: ({what}).*expected .*found .*may differ.*[Nn]othing"):
        export_onnx(model, file, [pictures(1, seed=9)[0]])
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([] if before is None else [before])


def session_of(model: InspectionModel) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(inspection_graph(model).SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", ["local", "logit before the whitening", "permutation", "MAF"])
def test_a_batch_gives_the_results_of_its_images(name: str) -> None:
    model = model_of(FLOWS[name]())
    session = session_of(model)
    assert [value.shape[0] for value in (*session.get_inputs(), *session.get_outputs())] == ["batch"] * 6
    images = pictures(5, (40, 23), seed=3)
    together = session.run(None, {"image": images})
    for i, image in enumerate(images):
        alone = session.run(None, {"image": image[None]})
        for one, of_all in zip(alone, together, strict=True):
            np.testing.assert_allclose(of_all[i], one[0], rtol=1e-5, atol=1e-5)
    shapes = [output.shape for output in session.run(None, {"image": images[:0]})]
    assert shapes == [(0,), (0, SIZE, SIZE), (0,), (0,), (0,)]


def test_images_that_are_mixed_within_a_batch_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is right for single images, and adds up the scores of a batch."""

    def mixed(model: InspectionModel) -> Any:
        proto = inspection_graph(model)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0), "first_axis"))
        node = next(node for node in proto.graph.node if node.output[0] == "score")
        node.op_type = "CumSum"
        node.input.append("first_axis")
        return proto

    monkeypatch.setattr(module, "inspection_graph", mixed)
    for images in ([pictures(1, seed=9)[0]], list(pictures(3, seed=9))):
        with pytest.raises(ExportError, match="in a batch: score: expected"):
            export_onnx(model_of([whitening()]), tmp_path / "model.onnx", images)
    assert not list(tmp_path.iterdir())


def test_a_wrong_threshold_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of([whitening()])
    higher = model.with_calibration(Calibration(model.calibration.scores, 0.9, None, "split"))
    monkeypatch.setattr(module, "inspection_graph", lambda _: inspection_graph(higher))
    scores = model.predict(NORMALS).scores
    between = [
        NORMALS[i].permute(1, 2, 0).numpy()
        for i in np.flatnonzero((scores > higher.calibration.threshold) & (scores < model.calibration.threshold))
    ]
    with pytest.raises(ExportError, match="verdict"):
        export_onnx(model, tmp_path / "model.onnx", between)


def test_a_graph_that_is_no_onnx_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: InspectionModel) -> Any:
        proto = inspection_graph(model)
        proto.graph.node[0].op_type = "NoSuchOperator"
        return proto

    monkeypatch.setattr(module, "inspection_graph", broken)
    with pytest.raises(ExportError, match="NoSuchOperator"):
        export_onnx(model_of([whitening()]), tmp_path / "model.onnx", CHECKS[:1])
    assert not list(tmp_path.iterdir())


def nudged(model: InspectionModel, by: float) -> InspectionModel:
    """Every standardised term, and so the whole map, is larger by ``by``."""
    statistics = model.statistics
    mean = statistics.mean - by * statistics.deviation
    return replace(model, statistics=TermStatistics(mean, statistics.deviation, statistics.nll))


def test_at_the_threshold_rounding_may_decide_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A recalibration on the check images: one of them is the threshold.
    model = model_of([whitening()])
    images = [image.permute(1, 2, 0).numpy() for image in NORMALS]
    scores = np.array([model.predict(image[None]).scores[0] for image in NORMALS])
    model = model.with_calibration(Calibration(scores, 0.1, None, "split"))
    at = int(np.flatnonzero(scores == model.calibration.threshold)[0])
    monkeypatch.setattr(module, "inspection_graph", lambda given: inspection_graph(nudged(given, 3e-5)))
    report = export_onnx(model, tmp_path / "model.onnx", images)
    assert report.undecided == (f"check image {at}",) and f"check image {at}" in report.describe()
    monkeypatch.setattr(module, "inspection_graph", lambda given: inspection_graph(nudged(given, 0.1)))
    with pytest.raises(ExportError):
        export_onnx(model, tmp_path / "model.onnx", images)


ALONE = """
import json, sys
import numpy as np, onnxruntime
from PIL import Image
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
names = [output.name for output in session.get_outputs()]
outputs = [output[0] for output in session.run(None, {"image": np.asarray(Image.open(sys.argv[2]))[None]})]
assert not {"fastmaf", "torch"} & set(sys.modules)
about = session.get_modelmeta().custom_metadata_map
print(json.dumps([dict(zip(names, (np.asarray(item).tolist() for item in outputs))), about]))
"""


def test_plain_onnxruntime_gives_the_numbers(tmp_path: Path) -> None:
    images = torch.cat([NORMALS, NORMALS.flip(3)])
    recipe = Recipe(SIZE, 8, shift_radius=1, blocks=2, steps=5, folds=2)
    model = fit(images, recipe, progress=False).model
    files = []
    for i, shape in enumerate([(37, 50), (16, 16)]):
        files.append(tmp_path / f"Prüfbild {i}.png")
        Image.fromarray(pictures(1, shape, 20 + i)[0]).save(files[-1])
    target = tmp_path / "neuer Ordner" / "modèle.onnx"
    report = export_onnx(model, target, files)
    assert list(target.parent.iterdir()) == [target] and report.path == target
    for file in files:
        command = [sys.executable, "-c", ALONE, str(target), str(file)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
        outputs, about = json.loads(done.stdout)
        pixels: Tensor = load_image(file, SIZE)[0]
        expected = model.predict(pixels[None])
        assert outputs["score"] == pytest.approx(expected.scores[0], rel=1e-5)
        assert outputs["nll"] == pytest.approx(expected.nll[0], rel=1e-5)
        np.testing.assert_allclose(outputs["map"], expected.anomaly_maps[0], atol=1e-4)
        assert outputs["p_value"] == model.calibration.p_values(expected.scores)[0]
        assert outputs["anomalous"] is bool(model.calibration.is_anomalous(expected.scores)[0])
        assert float(about["threshold"]) == model.calibration.threshold
        assert about["false_alarm"] == "0.05" and about["fastmaf_version"] == fastmaf.__version__


def test_factors_are_stored_once(tmp_path: Path) -> None:
    model = model_of([fastmaf.GaussianWhitening(D, 200).fit_(to_unit(NORMALS), floor=1e-4)])
    model.save(tmp_path / "model.safetensors")
    report = export_onnx(model, tmp_path / "model.onnx", CHECKS[:1])
    assert report.bytes < 1.1 * (tmp_path / "model.safetensors").stat().st_size
    assert not onnx.external_data_helper.uses_external_data(onnx.load(tmp_path / "model.onnx").graph.initializer[0])


def test_grey_and_transparent_files_are_judged_as_they_are_read(tmp_path: Path) -> None:
    grey, clear = tmp_path / "grey.png", tmp_path / "clear.png"
    Image.fromarray(pictures(1, (30, 40))[0]).convert("L").save(grey)
    Image.fromarray(pictures(1, (30, 40))[0]).convert("RGBA").save(clear)
    assert export_onnx(model_of([whitening()]), tmp_path / "model.onnx", [grey, str(clear)]).images == 2


class Doubling(fastmaf.Transform):
    features = D

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, x.new_zeros(len(x))

    def forward_per_dim(self, x: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, terms


def test_refused_by_name(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    with pytest.raises(ExportError, match="Doubling.*GaussianWhitening"):
        export_onnx(model_of([whitening(), Doubling()]), target, CHECKS)
    model = model_of([whitening()])
    with pytest.raises(ExportError, match="at least one, found none"):
        export_onnx(model, target, [])
    with pytest.raises(ExportError, match=r"check image 1 must be uint8 \[h, w, 3\]; found float64 \[4, 4, 3\]"):
        export_onnx(model, target, [CHECKS[0], np.zeros((4, 4, 3))])
    with pytest.raises(ExportError, match="tolerance"):
        export_onnx(model, target, CHECKS, tolerance=0)
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(DataError, match=r"torn\.png"):
        export_onnx(model, target, [tmp_path / "torn.png"])
    assert not target.exists()


@pytest.mark.parametrize("scores", [[1.0], [2.0, 2.0, 2.0], [1.0, 2.0, np.inf]])
def test_a_calibration_without_a_spread_or_a_threshold(scores: list[float], tmp_path: Path) -> None:
    model = model_of([whitening()]).with_calibration(Calibration(np.array(scores), 0.05, None, "split"))
    with pytest.raises(ExportError, match="fastmaf inspect calibrate"):
        export_onnx(model, tmp_path / "model.onnx", CHECKS)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_missing_packages(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf"{package} .*pip install 'fastmaf\[export\]'"):
        export_onnx(model_of([whitening()]), tmp_path / "model.onnx", CHECKS[:1])
    assert not list(tmp_path.iterdir())
