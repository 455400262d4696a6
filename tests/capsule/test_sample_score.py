"""Drawing images from a model and judging it on a test set: the numbers, the files, and what is said."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastmaf
from fastmaf.capsule import evaluate as score
from fastmaf.capsule.config import TrainConfig
from fastmaf.capsule.evaluate import HISTOGRAM_FILE, METRICS_FILE, ROC_FILE, SCORES_FILE, evaluate
from fastmaf.capsule.models import Model, load_model, nll_of
from fastmaf.capsule.sample import GRID_FILE, SAMPLES_FOLDER, sample
from fastmaf.capsule.synthetic import draw_dataset
from fastmaf.capsule.train import train
from fastmaf.images.dataset import DataError, load_test, load_train, to_images, to_unit
from fastmaf.metrics import plots
from fastmaf.metrics.results import Evaluation, EvaluationError

CLASSES = {"crack": 2, "poke": 1, "squeeze": 2}


@pytest.fixture(autouse=True)
def undrawn() -> Iterator[None]:
    """Leaves the figures undrawn: that takes most of the time of a tiny evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nll_hist", "roc_curve"):
            patch.setattr(score, name, lambda path, *_: path.touch())
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("capsules")
    return draw_dataset(root, train=12, good=4, defects=CLASSES, size=32, progress=False)


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    config = TrainConfig(size=8, blocks=2, hidden_features=(16, 16), epochs=3, batch_size=4, lr=1e-3, holdout=0.25)
    return load_model(train(data, tmp_path_factory.mktemp("run"), config, progress=False).model)


@pytest.fixture
def judge(model: Model, data: Path, tmp_path: Path) -> Callable[..., Evaluation]:
    def call(model: Model = model, data: Path = data, **options: Any) -> Evaluation:
        return evaluate(model, data, tmp_path / "out", progress=False, **options)

    return call


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def held_out_nll(model: Model, data: Path) -> np.ndarray:
    images = load_train(data, size=8, progress=False)
    index = [i for i, path in enumerate(images.paths) if path.name in model.held_out]
    with torch.no_grad():
        return -model.flow.log_prob(to_unit(images.pixels[index])).double().numpy()


def test_samples_are_those_of_the_flow(model: Model, tmp_path: Path) -> None:
    result = sample(model, tmp_path, 7, seed=3, progress=False)
    with torch.no_grad():
        x = model.flow.sample(7, generator=torch.Generator().manual_seed(3))
    expected = to_images(x, 8).numpy()
    assert result.files == [tmp_path / SAMPLES_FOLDER / f"{i:03d}.png" for i in range(7)]
    assert sorted((tmp_path / SAMPLES_FOLDER).iterdir()) == result.files
    assert all(np.array_equal(pixels(file), image) for file, image in zip(result.files, expected, strict=True))
    assert result.seconds > 0


def test_the_grid_shows_all_of_them(model: Model, tmp_path: Path) -> None:
    result = sample(model, tmp_path, 3, progress=False)
    assert result.grid == tmp_path / GRID_FILE
    grid = pixels(result.grid)[..., :3].astype(int)
    for file in result.files:
        image = pixels(file).astype(int)
        enlarged = image.repeat(24, 0).repeat(24, 1)  # to 192 pixels
        at = [x for x in range(grid.shape[1] - 191) if abs(grid[6:198, x : x + 192] - enlarged).max() <= 1]
        assert len(at) == 1, f"{file.name} stands in the grid once"


def test_the_seed_makes_samples_repeatable(model: Model, tmp_path: Path) -> None:
    drawn = [sample(model, tmp_path / str(i), 2, seed=seed, progress=False) for i, seed in enumerate((0, 0, 1))]
    contents = [[file.read_bytes() for file in result.files] for result in drawn]
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]
    assert contents[0][0] != contents[0][1], "two samples are two images"


def test_more_samples_than_a_batch(model: Model, tmp_path: Path) -> None:
    result = sample(model, tmp_path, 65, progress=False)
    assert len(set(result.files)) == 65
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        x = torch.cat([model.flow.sample(n, generator=generator) for n in (64, 1)])
    expected = to_images(x, 8).numpy()
    assert np.array_equal(np.stack([pixels(file) for file in result.files]), expected)


@pytest.mark.parametrize("n", [0, -1])
def test_no_samples_is_an_error(model: Model, tmp_path: Path, n: int) -> None:
    with pytest.raises(ValueError, match=f"number of samples must be at least 1; found {n}"):
        sample(model, tmp_path, n, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_scores_are_negative_log_likelihoods(
    model: Model, data: Path, judge: Callable[..., Evaluation], tmp_path: Path
) -> None:
    evaluation = judge()
    images = load_test(data, size=8, progress=False)
    with torch.no_grad():
        expected = -model.flow.log_prob(to_unit(images.pixels)).double()
    with open(tmp_path / "out" / SCORES_FILE, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["nll"]) for row in rows] == pytest.approx(expected.tolist(), rel=1e-6)
    assert [row["label"] for row in rows] == ["good"] * 4 + [name for name, n in CLASSES.items() for _ in range(n)]
    assert [Path(row["file"]) for row in rows] == list(images.paths)
    bits = (expected / (192 * np.log(2))).tolist()
    assert [float(row["bits_per_dim"]) for row in rows] == pytest.approx(bits, rel=1e-6)
    called = [int(row["anomalous_youden"]) for row in rows]
    assert called == [int(float(row["nll"]) >= evaluation.youden.threshold) for row in rows]
    assert evaluation.counts == {"good": 4, **CLASSES}
    good = expected[:4].numpy()
    pairs = [(d > g) + 0.5 * (d == g) for d in expected[4:].numpy() for g in good]
    assert evaluation.auroc == pytest.approx(np.mean(pairs), abs=1e-12)


def test_metrics_hold_both_thresholds(
    model: Model, data: Path, judge: Callable[..., Evaluation], tmp_path: Path
) -> None:
    judge(extra={"seconds_per_sample": 0.5})
    metrics = json.loads((tmp_path / "out" / METRICS_FILE).read_text())
    with open(tmp_path / "out" / SCORES_FILE, newline="") as file:
        assert metrics["youden"]["threshold"] in [float(row["nll"]) for row in csv.DictReader(file)]
    assert "test labels" in metrics["youden"]["how"]
    own = held_out_nll(model, data)
    assert len(own) == 3
    assert metrics["held_out"]["threshold"] == pytest.approx(own.max(), rel=1e-6), "three are too few for 5 %"
    assert metrics["held_out"]["promised_rate"] == pytest.approx(1 / 4)
    assert set(metrics["per_class"]) == {"good", *CLASSES}
    assert len(metrics["auroc_interval"]) == 2
    assert metrics["seconds_per_sample"] == 0.5
    assert metrics["model"] == model.path.name
    for report in (metrics["youden"], metrics["held_out"]):
        assert sum(map(sum, report["confusion"])) == 9
        assert set(report["anomaly"]) == {"precision", "recall", "f1"} == set(report["normal"])


def test_the_false_alarm_rate_reaches_the_threshold(model: Model, data: Path, judge: Callable[..., Evaluation]) -> None:
    own = np.sort(held_out_nll(model, data))
    report = judge(false_alarm=0.5).held_out
    assert report is not None
    assert report.threshold == pytest.approx(own[1], rel=1e-6)  # ceil(4 · 0.5) = the second of three
    with pytest.raises(EvaluationError, match="false_alarm"):
        judge(false_alarm=1.5)


def test_the_figures_are_pictures(
    judge: Callable[..., Evaluation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nll_hist", "roc_curve"):
        monkeypatch.setattr(score, name, getattr(plots, name))
    judge()
    for name in (HISTOGRAM_FILE, ROC_FILE):
        picture = pixels(tmp_path / "out" / name)
        assert min(picture.shape[:2]) > 300
        assert len(np.unique(picture[..., 0])) > 20, "it is not blank"


def test_the_bootstrap_repeats_by_seed(judge: Callable[..., Evaluation]) -> None:
    assert judge(seed=1).auroc_interval == judge(seed=1).auroc_interval


def test_missing_held_out_images_are_said(
    model: Model, data: Path, judge: Callable[..., Evaluation], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(data, tmp_path / "data"))
    gone, *left = sorted(model.held_out)
    (other / "train" / "good" / gone).unlink()
    report = judge(data=other).held_out
    said = capsys.readouterr().out
    assert "1 of the 3 normal images that training held out are not in" in said
    assert "taken from the others" in said
    assert report is not None
    assert "2 held-out normals" in report.how
    for name in left:
        (other / "train" / "good" / name).unlink()
    evaluation = judge(data=other)
    assert "no threshold can be taken from held-out normals" in capsys.readouterr().out
    assert evaluation.held_out is None
    assert json.loads((tmp_path / "out" / METRICS_FILE).read_text())["held_out"] is None


def test_a_test_set_without_training_images_is_judged_all_the_same(
    data: Path, judge: Callable[..., Evaluation], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "data"
    shutil.copytree(data / "test", other / "test")
    evaluation = judge(data=other)
    assert evaluation.held_out is None
    assert evaluation.auroc == judge().auroc
    said = capsys.readouterr().out
    assert f"no folder train/good in {other}: no threshold can be taken from held-out normals" in said
    assert (tmp_path / "out" / ROC_FILE).is_file()


def test_a_model_that_held_nothing_out_has_one_threshold(model: Model, judge: Callable[..., Evaluation]) -> None:
    evaluation = judge(model=dataclasses.replace(model, held_out=()))
    assert evaluation.held_out is None
    assert evaluation.held_out_reason == "no scores of held-out normals were given"


@pytest.mark.parametrize(("gone", "word"), [(["good"], "normal"), (list(CLASSES), "defect")])
def test_a_test_set_without_good_or_without_defects(
    data: Path, judge: Callable[..., Evaluation], tmp_path: Path, gone: list[str], word: str
) -> None:
    other = Path(shutil.copytree(data, tmp_path / "data"))
    for name in gone:
        shutil.rmtree(other / "test" / name)
    with pytest.raises(EvaluationError, match=f"there is no {word}; images found: "):
        judge(data=other)
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_test_images_are_named_or_left_out(
    data: Path, judge: Callable[..., Evaluation], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(data, tmp_path / "data"))
    (other / "test" / "crack" / "001.png").write_text("no image at all")
    with pytest.raises(DataError, match=r"crack.001\.png"):
        judge(data=other)
    assert judge(data=other, skip_bad=True).counts["crack"] == 1
    assert "1 file skipped" in capsys.readouterr().out


def test_no_test_folder(data: Path, judge: Callable[..., Evaluation], tmp_path: Path) -> None:
    other = tmp_path / "data"
    shutil.copytree(data / "train", other / "train")
    with pytest.raises(DataError, match=r"no folder test in "):
        judge(data=other)


@pytest.mark.parametrize("features", [7, 30, 301])
def test_a_model_of_another_shape_is_refused_with_its_size(tmp_path: Path, features: int) -> None:
    path = tmp_path / "other.safetensors"
    fastmaf.MAF(features, 1, (8,), seed=0).save(path)
    with pytest.raises(fastmaf.CheckpointError, match=rf"square RGB images .*; found {features} features"):
        load_model(path)


def test_a_model_of_images_from_the_library_is_taken(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    fastmaf.MAF(300, 1, (16,), seed=0).save(path)
    model = load_model(path)
    assert (model.size, model.held_out) == (10, ())
    assert evaluate(model, data, tmp_path, progress=False).features == 300


def test_no_model_where_one_was_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model file at .*model\.safetensors"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_text("hello")
    with pytest.raises(fastmaf.CheckpointError, match="not a safetensors file"):
        load_model(tmp_path)


def test_scoring_in_batches_changes_nothing(model: Model, data: Path) -> None:
    images = load_test(data, size=8, progress=False)
    whole, cut = (nll_of(model.flow, images, batch_size=n, progress=False) for n in (64, 2))
    assert whole.dtype == np.float64
    np.testing.assert_allclose(cut, whole, rtol=1e-6)
    assert nll_of(model.flow, images.subset([]), progress=False).shape == (0,)
