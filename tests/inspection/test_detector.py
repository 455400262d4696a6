"""fastmaf.Detector: scikit-learn's own checks, rows of every odd kind, and images in every form."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import multivariate_normal
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from fastmaf.capsule.synthetic import draw_dataset
from fastmaf.images.dataset import load_train
from fastmaf.images.decode import DataError
from fastmaf.inspection.calibration import CalibrationError
from fastmaf.inspection.detector import Detector
from fastmaf.inspection.fit import fit
from fastmaf.inspection.model import InspectionModel, load_inspection
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.row_model import RowModel

SMALL: dict[str, Any] = {"size": 16, "rank": 20, "blocks": 1, "steps": 5, "folds": 3}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread, and lose seconds where it waits for a busy core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore::UserWarning")  # few samples, and the deprecations of scikit-learn's own checks
@pytest.mark.filterwarnings("ignore::FutureWarning")
@parametrize_with_checks([Detector()])
def test_keeps_the_conventions_of_scikit_learn(estimator: Detector, check: object) -> None:
    check(estimator)  # type: ignore[operator, arg-type]


def correlated(n: int, seed: int = 0) -> np.ndarray:
    """Rows of six columns that one factor explains, in units from 1e-3 to 1e4."""
    rng = np.random.default_rng(seed)
    plain = rng.normal(size=(n, 1)) + 0.1 * rng.normal(size=(n, 6))
    return plain * np.array([1e-3, 1, 10, 1e4, 1, 5]) + np.array([0, 3, -20, 1e5, 0, 7])


# Rows


def test_the_score_of_rows_is_their_negative_log_likelihood_in_nats() -> None:
    rows = correlated(200)
    model = Detector().fit(rows).model_
    assert isinstance(model, RowModel)
    parts = model.flow.transforms[0]
    low = (parts.factors * parts.variance) @ parts.factors.T  # type: ignore[operator, union-attr]
    root = parts.scale.numpy()  # type: ignore[union-attr, operator]
    covariance = root[:, None] * (np.eye(6) + low.numpy()) * root
    standard = (rows - model.shift) / model.scale
    expected = -multivariate_normal(parts.mean.numpy(), covariance).logpdf(standard)  # type: ignore[union-attr, operator]
    np.testing.assert_allclose(model.nll(torch.from_numpy(rows)), expected + np.log(model.scale).sum(), rtol=1e-6)
    np.testing.assert_allclose(covariance, np.corrcoef(rows.T), rtol=0.1)


def test_a_broken_correlation_is_found_though_each_column_is_normal() -> None:
    rows, odd = correlated(100), correlated(200, 1)
    odd[:, 1] = np.random.default_rng(2).permutation(odd[:, 1])
    scores = Detector().fit(rows).anomaly_score(np.concatenate([correlated(200, 3), odd]))
    assert roc_auc_score([0] * 200 + [1] * 200, scores) > 0.85


def test_false_alarms_are_as_rare_as_guaranteed() -> None:
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(5):
        detector = Detector(false_alarm=0.1).fit(rng.normal(size=(60, 4)))
        rates.append(float((detector.predict(rng.normal(size=(500, 4))) == -1).mean()))
    assert 0.03 < np.mean(rates) < 0.16  # a rate's deviation over calibration sets of 60 is 0.04


def test_verdict_decision_threshold_and_p_value_say_the_same() -> None:
    detector = Detector(false_alarm=0.2).fit(correlated(60))
    at_threshold = float(detector.calibration_.threshold)
    rows = np.concatenate([correlated(60), correlated(300, 5), 1.5 * correlated(50, 6)])
    scores, verdict = detector.anomaly_score(rows), detector.predict(rows)
    assert {-1, 1} == set(verdict.tolist())
    np.testing.assert_array_equal(verdict == -1, detector.calibration_.is_anomalous(scores))
    np.testing.assert_array_equal(verdict == -1, detector.decision_function(rows) < 0)
    np.testing.assert_array_equal(verdict == -1, detector.p_values(rows) <= detector.calibration_.expected_rate)
    np.testing.assert_array_equal(detector.score_samples(rows), -scores)
    assert detector.offset_ == -at_threshold


def test_the_names_of_pyod_agree_with_those_of_scikit_learn() -> None:
    rows = correlated(300)
    detector = Detector(random_state=1).fit(rows[:200])
    assert detector.threshold_ == -detector.offset_ == detector.calibration_.threshold
    np.testing.assert_array_equal(np.sort(detector.decision_scores_), detector.calibration_.scores)
    np.testing.assert_array_equal(detector.labels_, detector.decision_scores_ > detector.threshold_)
    assert detector.labels_.dtype == np.int64 and 0 < detector.labels_.sum() <= 0.05 * 200
    probability = detector.predict_proba(rows[200:])
    np.testing.assert_array_equal(probability[:, 0], detector.p_values(rows[200:]))
    np.testing.assert_allclose(probability.sum(axis=1), 1)
    order = np.argsort(detector.anomaly_score(rows[200:]))
    assert (np.diff(probability[order, 1]) >= 0).all()
    outlier = probability[:, 1] >= 1 - detector.calibration_.expected_rate - 1e-12
    np.testing.assert_array_equal(outlier, detector.predict(rows[200:]) == -1)


def test_held_out_scores_are_in_the_order_of_the_samples() -> None:
    rows = correlated(100)
    rows[37] *= 3
    detector = Detector().fit(rows)
    assert detector.decision_scores_.argmax() == 37 and detector.labels_[37] == 1


def test_one_column_and_what_never_varies() -> None:
    rows = np.random.default_rng(0).normal(5, 2, size=(100, 1))
    np.testing.assert_array_equal(Detector().fit(rows).predict([[5.0], [30.0], [-20.0]]), [1, -1, -1])
    with_constant = np.hstack([rows, np.full((100, 1), 1e6)])
    detector = Detector().fit(with_constant)
    np.testing.assert_array_equal(detector.predict([[5.0, 1e6], [5.0, 1e6 + 1]]), [1, -1])
    nothing_varies = Detector().fit(np.ones((30, 3)))
    np.testing.assert_array_equal(nothing_varies.predict([[1.0, 1, 1], [1, 1, 1.1]]), [1, -1])


@pytest.mark.parametrize("n", [2, 3, 4])
def test_few_rows_fit_with_a_warning_that_the_guarantee_is_not_attainable(n: int) -> None:
    with pytest.warns(UserWarning, match=f"0.05 needs 19 samples; found {n}"):
        detector = Detector().fit(correlated(n))
    assert np.isfinite(detector.anomaly_score(correlated(5, 1))).all()
    assert detector.calibration_.n == n and not detector.calibration_.attainable


def test_enough_rows_fit_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Detector().fit(correlated(19))


def test_more_columns_than_rows() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(3, 200))
    rows = rng.normal(size=(70, 3)) @ mixing + 0.1 * rng.normal(size=(70, 200))
    detector = Detector(folds=5).fit(rows[:40])
    assert (detector.predict(rows[40:]) == 1).mean() > 0.7
    assert (detector.predict(rows[40:] + rng.normal(size=(30, 200))) == -1).all()


def test_a_row_too_far_away_for_its_score_is_an_outlier_and_not_nan() -> None:
    detector = Detector().fit(correlated(50))
    far = np.full((2, 6), 1e300) * np.array([[1], [-1]])
    np.testing.assert_array_equal(detector.predict(far), [-1, -1])
    assert (detector.p_values(far) == 1 / 51).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_refused(value: float) -> None:
    rows = correlated(30)
    detector = Detector().fit(rows)
    rows[3, 2] = value
    for call in (clone(detector).fit, detector.predict, detector.anomaly_score):
        with pytest.raises(ValueError, match="NaN|infinity"):
            call(rows)


def test_tensors_lists_and_arrays_are_the_same_rows() -> None:
    rows = correlated(40)
    expected = Detector().fit(rows).anomaly_score(rows)
    np.testing.assert_array_equal(Detector().fit(torch.from_numpy(rows)).anomaly_score(rows.tolist()), expected)
    backwards = Detector().fit(rows[:, ::-1])
    np.testing.assert_allclose(backwards.anomaly_score(rows[:, ::-1]), expected, rtol=1e-6)


def test_the_unit_of_a_column_changes_no_verdict() -> None:
    rows, new = correlated(60), correlated(100, 4)
    scale = np.array([1e6, 1e-6, 1, 2, 1e-3, 1])
    plain, scaled = Detector().fit(rows), Detector().fit(rows * scale)
    shift = np.log(scale).sum()
    np.testing.assert_allclose(scaled.anomaly_score(new * scale) - shift, plain.anomaly_score(new), atol=1e-6)


def test_random_state_decides_the_folds() -> None:
    rows = correlated(60)

    def held_out(random_state: object) -> np.ndarray:
        return Detector(random_state=random_state).fit(rows).calibration_.scores  # type: ignore[arg-type]

    np.testing.assert_array_equal(held_out(3), held_out(3))
    np.testing.assert_array_equal(held_out(np.random.RandomState(3)), held_out(np.random.RandomState(3)))
    assert not np.array_equal(held_out(3), held_out(4))
    assert not np.array_equal(held_out(None), held_out(None))


def test_in_a_pipeline_behind_other_steps() -> None:
    rows = correlated(100)
    line = make_pipeline(StandardScaler(), PCA(3), Detector(folds=4))
    verdict = line.fit(rows).predict(rows)
    assert (verdict == 1).mean() > 0.8
    np.testing.assert_array_equal(line.decision_function(rows) < 0, verdict == -1)
    assert line[-1].n_features_in_ == 3
    assert clone(line).set_params(detector__false_alarm=0.3).fit(rows)[-1].offset_ > line[-1].offset_


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"false_alarm": 0.0}, CalibrationError, "false_alarm: expected a finite number .*less than 1; found 0.0"),
        ({"confidence": 1}, CalibrationError, "confidence: expected"),
        ({"folds": 1}, ValueError, "folds must be at least 2; found 1"),
        ({"rank": -1}, ValueError, "rank must be .*; found -1"),
        ({"size": 0}, ValueError, "size must be at least 1; found 0"),
    ],
)
def test_a_parameter_that_does_not_fit_is_named_by_fit(wrong: dict, error: type[Exception], message: str) -> None:
    detector = Detector(**wrong)
    with pytest.raises(error, match=message):
        detector.fit(correlated(30))


def test_what_only_images_have_is_refused_for_rows(tmp_path: Path) -> None:
    detector = Detector().fit(correlated(30))
    with pytest.raises(ValueError, match="fitted to rows"):
        detector.anomaly_map(correlated(3))
    with pytest.raises(ValueError, match="fitted to rows"):
        detector.save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"expected \[n, 6\]; found images"):
        detector.predict(np.zeros((1, 8, 8, 3), np.uint8))
    assert not list(tmp_path.iterdir())


# Images


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kapseln ä ö") / "set"
    return draw_dataset(folder, train=30, good=6, defects={"crack": 1, "squeeze": 5}, size=64, progress=False)


@pytest.fixture(scope="module")
def files(root: Path) -> list[Path]:
    return sorted((root / "train" / "good").glob("*.png"))


@pytest.fixture(scope="module")
def images(files: list[Path]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in files])


@pytest.fixture(scope="module")
def fitted(images: np.ndarray) -> Detector:
    return Detector(**SMALL).fit(images)


def test_it_is_the_model_of_the_recipe(fitted: Detector, root: Path, images: np.ndarray) -> None:
    pixels = load_train(root, size=16, progress=False).pixels
    expected = fit(pixels, Recipe(16, 20, blocks=1, steps=5, folds=3), progress=False).model
    assert isinstance(fitted.model_, InspectionModel)
    prediction = expected.predict(pixels)
    np.testing.assert_array_equal(fitted.anomaly_score(images), prediction.scores)
    np.testing.assert_array_equal(fitted.anomaly_map(images), prediction.anomaly_maps)
    assert fitted.offset_ == -expected.calibration.threshold
    assert fitted.n_features_in_ == 3 * 16 * 16
    assert fitted.anomaly_map(images[:2]).shape == (2, 16, 16) and prediction.anomaly_maps.dtype == np.float32


def test_every_form_of_the_images_gives_the_same_scores(
    fitted: Detector, images: np.ndarray, files: list[Path]
) -> None:
    expected = fitted.anomaly_score(images[:4])
    forms = {
        "paths": files[:4],
        "names": [str(file) for file in files[:4]],
        "an array of names": np.array([str(file) for file in files[:4]]),
        "a tuple of arrays": tuple(images[:4]),
        "a tensor": torch.from_numpy(images[:4]),
        "pictures": [Image.fromarray(image) for image in images[:4]],
        "a strided array": images[:4, ::-1][:, ::-1],
    }
    for name, form in forms.items():
        np.testing.assert_allclose(fitted.anomaly_score(form), expected, rtol=1e-5, err_msg=name)


def test_images_of_different_sizes(fitted: Detector, images: np.ndarray) -> None:
    large = images[0].repeat(3, axis=0).repeat(2, axis=1)  # the same once it is reduced
    scores = fitted.anomaly_score([large, images[0]])
    assert scores[0] == pytest.approx(scores[1], abs=0.01 * abs(fitted.offset_))


def test_a_defect_scores_higher_than_the_good_ones(fitted: Detector, root: Path) -> None:
    good, bad = (sorted((root / "test" / name).glob("*.png")) for name in ("good", "squeeze"))
    scores = fitted.anomaly_score([*good, *bad])
    assert roc_auc_score([0] * len(good) + [1] * len(bad), scores) > 0.8
    wrecked = np.asarray(Image.open(good[0])).copy()
    wrecked[20:40, 20:40] = (255, 0, 255)
    assert fitted.predict(wrecked[None]).tolist() == [-1]
    assert fitted.p_values(wrecked[None])[0] == 1 / 31
    at = np.unravel_index(fitted.anomaly_map(wrecked[None])[0].argmax(), (16, 16))
    assert all(4 <= i < 11 for i in at)


def test_blocks_change_no_score(fitted: Detector, images: np.ndarray) -> None:
    without_blocks = clone(fitted).set_params(blocks=0).fit(images)
    np.testing.assert_array_equal(without_blocks.anomaly_score(images), fitted.anomaly_score(images))
    assert without_blocks.offset_ == fitted.offset_


def test_the_guarantee_is_that_of_the_parameters(images: np.ndarray, fitted: Detector) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loose = clone(fitted).set_params(false_alarm=0.3, confidence=0.9, blocks=0).fit(images)
    assert (loose.calibration_.false_alarm, loose.calibration_.confidence) == (0.3, 0.9)
    assert loose.model_.calibration is loose.calibration_  # type: ignore[union-attr]
    assert loose.offset_ > fitted.offset_
    with pytest.warns(UserWarning, match="0.01 needs 99 samples; found 30"):
        clone(fitted).set_params(false_alarm=0.01, blocks=0).fit(images)


def test_saved_and_loaded_it_says_the_same(fitted: Detector, images: np.ndarray, tmp_path: Path) -> None:
    fitted.save(tmp_path / "kapsel ß.safetensors")
    loaded = Detector.load(tmp_path / "kapsel ß.safetensors")
    assert loaded.get_params() == fitted.get_params()
    np.testing.assert_array_equal(loaded.anomaly_score(images), fitted.anomaly_score(images))
    np.testing.assert_array_equal(loaded.predict(images), fitted.predict(images))
    np.testing.assert_array_equal(loaded.p_values(images), fitted.p_values(images))
    assert (loaded.offset_, loaded.n_features_in_) == (fitted.offset_, fitted.n_features_in_)
    assert load_inspection(tmp_path / "kapsel ß.safetensors").size == 16
    with pytest.raises(FileNotFoundError):
        Detector.load(tmp_path / "none.safetensors")


@pytest.mark.slow
def test_held_out_scores_of_images_are_in_their_order(fitted: Detector, images: np.ndarray, tmp_path: Path) -> None:
    assert fitted.decision_scores_.shape == fitted.labels_.shape == (len(images),)
    np.testing.assert_array_equal(np.sort(fitted.decision_scores_), fitted.calibration_.scores)
    spoiled = images.copy()
    spoiled[5, 8:24, 8:24] = 0
    detector = Detector(**{**SMALL, "blocks": 0}).fit(spoiled)
    assert detector.decision_scores_.argmax() == 5
    fitted.save(tmp_path / "d.safetensors")
    loaded = Detector.load(tmp_path / "d.safetensors")
    assert loaded.threshold_ == fitted.threshold_ and not hasattr(loaded, "decision_scores_")
    np.testing.assert_array_equal(loaded.predict_proba(images), fitted.predict_proba(images))


def test_in_a_pipeline_behind_a_function(images: np.ndarray, fitted: Detector) -> None:
    line = make_pipeline(FunctionTransformer(lambda x: x[:, :, ::-1]), clone(fitted).set_params(blocks=0))
    verdict = line.fit(images).predict(images[:, :, ::-1])
    assert verdict.shape == (30,) and set(verdict.tolist()) <= {-1, 1}
    assert line.fit_predict(images).tolist() == line.predict(images).tolist()


@pytest.mark.slow
def test_refitted_to_rows_nothing_of_the_images_is_left(images: np.ndarray, fitted: Detector) -> None:
    detector = clone(fitted).set_params(blocks=0).fit(images)
    rows = images.reshape(30, -1)[:, :7]
    detector.fit(rows)
    assert (detector.n_features_in_, type(detector.model_)) == (7, RowModel)
    detector.fit(images)
    assert detector.n_features_in_ == 768
    np.testing.assert_array_equal(detector.anomaly_score(images), fitted.anomaly_score(images))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((2, 3, 8, 8), np.uint8), r"uint8 \[n, h, w, 3\]; found uint8 \[3, 8, 8\] as image 0"),
        (np.zeros((2, 8, 8, 3)), r"uint8 \[n, h, w, 3\]; found float64 \[8, 8, 3\] as image 0"),
        (np.zeros((8, 8, 3), np.uint8), r"uint8 \[n, h, w, 3\]; found uint8 \[8, 3\] as image 0"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"at least 1 image.*found uint8 \[0, 8, 8, 3\]"),
        (np.zeros((2, 0, 8, 3), np.uint8), r"found uint8 \[0, 8, 3\] as image 0"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)], r"found uint8 \[8, 8\] as image 1"),
        (np.zeros((2, 768)), r"fitted to images: expected uint8 \[n, h, w, 3\] or paths; found float64 \[2, 768\]"),
        ([], "fitted to images.*found list"),
        ("one.png", "a sequence of paths or images; found the one path 'one.png'"),
        (["there is none.png"], "there is none.png"),
    ],
)
def test_what_is_no_image_is_refused(fitted: Detector, wrong: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted.predict(wrong)


def test_a_damaged_file_is_named_and_two_images_are_too_few(tmp_path: Path, files: list[Path]) -> None:
    (tmp_path / "broken.png").write_bytes(files[0].read_bytes()[:200])
    with pytest.raises(DataError, match="broken.png"):
        Detector(**SMALL).fit([*files[:3], tmp_path / "broken.png"])
    with pytest.raises(ValueError, match="at least 3 good images; found 2"):
        Detector(**SMALL).fit(files[:2])
    with pytest.warns(UserWarning, match="needs 19 samples; found 3"):
        few = Detector(**{**SMALL, "blocks": 0}).fit(files[:3])
    assert np.isfinite(few.anomaly_score(files[:5])).all()


def test_before_fit_nothing_is_scored(files: list[Path]) -> None:
    detector = Detector()
    for call in (detector.predict, detector.anomaly_score, detector.p_values, detector.anomaly_map, detector.save):
        with pytest.raises(NotFittedError):
            call(files[:1])  # type: ignore[operator, arg-type]
