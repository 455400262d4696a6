"""Anomaly detection with scikit-learn's interface: ``fastmaf.Detector``, for images and for rows of numbers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

import fastmaf
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.detector_input import are_images, found_in, square_pixels
from fastmaf.inspection.fit import fit
from fastmaf.inspection.interface import AnomalyModel, maps_of, scores_of
from fastmaf.inspection.kinds import KINDS, TEXTURE_SIZE, Kind, fit_texture_model, plausible_kind
from fastmaf.inspection.model import InspectionModel, Shapes, load_inspection
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.row_model import RowModel, fit_rows
from fastmaf.inspection.sizes import fit_sizes
from fastmaf.inspection.texture.model import TextureModel

try:
    from sklearn.utils.validation import validate_data
except ImportError:  # scikit-learn before 1.6

    def validate_data(estimator: Any, *args: Any, **options: Any) -> Any:
        """Calls the method that this function used to be."""
        return estimator._validate_data(*args, **options)


class Detector(OutlierMixin, BaseEstimator):
    """Anomaly detector, fitted to normal samples, with a calibrated false-alarm rate.

    For images it is the model of ``fastmaf inspect fit``: a Gaussian whitening with augmentation, whose
    score is the mean of the highest values of a standardised, smoothed score map, and anomaly maps. For rows it is the
    whitening of the standardised columns, and the score is the NLL in nats. The threshold comes from samples scored by
    models that have not seen them (K folds) and keeps the requested false-alarm rate. There is no ``contamination``
    parameter: all samples that it is fitted to must be normal.

    X is always either

    - images: uint8 ``[n, h, w, 3]``, an array, a tensor or a sequence of ``[h, w, 3]`` of any sizes, R, G, B; or a
      sequence of paths of image files. They are resized to ``size``;
    - or rows: finite numbers ``[n, D]``.

    Args:
        size: images only: side in pixels of the square that each is resized to.
        rank: factors of the whitening; fewer if the samples or columns do not support them.
        blocks: images only: autoregressive blocks after the whitening; ``"auto"``: two if held-out images are more
            likely with them, else none. They lower the NLL that ``model_`` reports; the score does not use them: 0
            gives the same scores faster.
        steps: images only: training steps of the blocks.
        folds: K, at least 2; at most the number of samples is used.
        false_alarm: false-alarm rate on new normal samples, on average over calibration sets.
        confidence: None, or the probability with which this calibration set keeps that rate.
        kind: images only: ``"object"``, whose parts have a fixed place or shape; ``"texture"``, which looks the same
            everywhere: a density of local features, of which each image is seen at its own aspect ratio; or ``"auto"``:
            what the samples, and synthetic defects on them, call for. See ``fastmaf.inspection.kinds``.
        random_state: of folds and blocks. By default the same samples give the same model.
        verbose: images only: show a progress bar.

    Attributes:
        model_: an ``AnomalyModel`` for images, usually ``InspectionModel``, or ``RowModel``.
        calibration_: held-out scores and their guarantee; ``print(detector.calibration_.describe())``.
        offset_: minus the threshold: ``decision_function = score_samples - offset_``.
        n_features_in_: D; for images the number of values of a resized one, 3 size², or size² if all images are grey.

    Example:
        >>> import numpy as np, fastmaf
        >>> rows = np.random.default_rng(0).normal(size=(200, 4))
        >>> detector = fastmaf.Detector(false_alarm=0.05).fit(rows)
        >>> detector.predict([[9.0, 9.0, 9.0, 9.0]])
        array([-1])
    """

    def __init__(
        self,
        *,
        size: int = 64,
        rank: int = 400,
        blocks: int | Literal["auto"] = "auto",
        steps: int = 200,
        folds: int = 10,
        false_alarm: float = 0.05,
        confidence: float | None = None,
        kind: Kind = "object",
        random_state: int | np.random.RandomState | None = 0,
        verbose: bool = False,
    ) -> None:
        self.size = size
        self.rank = rank
        self.blocks = blocks
        self.steps = steps
        self.folds = folds
        self.false_alarm = false_alarm
        self.confidence = confidence
        self.kind = kind
        self.random_state = random_state
        self.verbose = verbose

    @fastmaf.torch_defaults()
    def fit(self, X: Any, y: Any = None, groups: Sequence[Any] | None = None) -> Detector:
        """Fits to at least 3 good images, or at least 2 normal rows; see the class for X. ``y`` is ignored.

        Args:
            X: the good samples.
            y: ignored.
            groups: images only: the group of each, such as its part, batch or day. Whole groups are held out, so that
                the threshold is one for images of new groups.

        Warns:
            UserWarning: there are too few samples for the requested false-alarm rate.

        Raises:
            ValueError: X or a parameter is invalid.
            DataError: an image file cannot be read.
        """
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}; found {self.kind!r}")
        Calibration(np.zeros(1), self.false_alarm, self.confidence, "split")  # reports an invalid rate before fitting
        given = self.random_state
        seed = int(given if isinstance(given, Integral) else check_random_state(given).randint(2**31 - 1))
        images = are_images(X)
        if groups is not None and not images:
            raise ValueError("groups are for images: rows are held out at random")
        if images:
            samples, double, _ = square_pixels(X, self.size, double=True)
        else:
            samples, double = self._rows(X, ensure_min_samples=2), None
        n = len(samples)
        if images and n < 3:
            raise ValueError(f"X must hold at least 3 good images; found {n}")
        planned = Calibration(np.zeros(n), self.false_alarm, self.confidence, "split")
        if not planned.attainable:  # before the work
            least = planned.min_samples
            warnings.warn(f"a false-alarm rate of {self.false_alarm:g} needs {least} samples; found {n}", stacklevel=4)
        folds = self.folds if self.folds < 2 else min(self.folds, n)
        recipe = Recipe(self.size, self.rank, blocks=self.blocks, steps=self.steps, folds=folds, seed=seed)
        self.model_: AnomalyModel | RowModel
        if images:
            labels = None if groups is None else [str(group) for group in groups]
            options: dict[str, Any] = {"double": double, "groups": labels, "progress": self.verbose}
            kind = plausible_kind(samples)[0] if self.kind == "auto" else self.kind
            model = (
                fit(samples, recipe, **options).model if kind == "object" else self._texture(X, kind, recipe, **options)
            )
            self._use(model.with_calibration(model.calibration.with_rate(self.false_alarm, self.confidence)))
        else:
            self.model_, scores = fit_rows(samples, self.rank, folds, seed)
            self.calibration_ = Calibration(scores, self.false_alarm, self.confidence, "k-fold", folds)
        self.offset_ = -self.calibration_.threshold
        return self

    @fastmaf.torch_defaults()
    def anomaly_score(self, X: Any) -> np.ndarray:
        """Returns anomaly scores, float64 [n], higher is more anomalous; for rows in nats."""
        check_is_fitted(self)
        if not isinstance(self.model_, RowModel):
            return scores_of(self.model_, *self._images(X))
        if are_images(X):
            raise ValueError(f"this detector was fitted to rows: expected [n, {self.n_features_in_}]; found images")
        return self.model_.nll(self._rows(X, reset=False))

    def score_samples(self, X: Any) -> np.ndarray:
        """Returns minus ``anomaly_score``, float64 [n], higher is more normal, as everywhere in scikit-learn."""
        return -self.anomaly_score(X)

    def decision_function(self, X: Any) -> np.ndarray:
        """Returns ``score_samples`` minus ``offset_``, float64 [n], negative for outliers."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> np.ndarray:
        """Returns -1 for outliers, whose score is above the threshold, and 1 for the others, int64 [n]."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def p_values(self, X: Any) -> np.ndarray:
        """Returns the probability that a normal sample scores at least as high, float64 [n]; see ``Calibration``."""
        scores = self.anomaly_score(X)
        return self.calibration_.p_values(scores)

    @fastmaf.torch_defaults()
    def anomaly_map(self, X: Any) -> np.ndarray:
        """Returns anomaly maps of images, float32 [n, size, size], higher is more anomalous."""
        check_is_fitted(self)
        if isinstance(self.model_, RowModel):
            raise ValueError("anomaly maps need images: this detector was fitted to rows")
        return maps_of(self.model_, *self._images(X))

    @fastmaf.torch_defaults()
    def save(self, path: str | Path, *, card: str | Path | None = None) -> None:
        """Writes a detector of images to one safetensors file, which the command line can read.

        Args:
            path: the file.
            card: a file for a model card in Markdown, filled in as far as the model's figures go; a card that was
                edited, or another file, is not replaced.
        """
        check_is_fitted(self)
        if isinstance(self.model_, RowModel):
            raise ValueError("only a detector that was fitted to images can be saved; this one was fitted to rows")
        self.model_.save(path, card=card)

    @classmethod
    @fastmaf.torch_defaults()
    def load(cls, path: str | Path) -> Detector:
        """Loads a file written by ``save`` or by the command line; errors as ``load_inspection``."""
        model = load_inspection(path)
        recipe = model.about.get("recipe", {})
        given = {**recipe, **model.about.get("asked", {})}
        known = {name: given[name] for name in ("rank", "blocks", "steps", "folds") if name in given}
        rate = {name: getattr(model.calibration, name) for name in ("false_alarm", "confidence")}
        known["kind"] = "texture" if isinstance(model, TextureModel) else "object"
        detector = cls(size=model.size, random_state=recipe.get("seed", 0), **known, **rate)
        detector._use(model)
        return detector

    def _use(self, model: AnomalyModel) -> None:
        self.model_, self.calibration_ = model, model.calibration
        self.offset_ = -model.calibration.threshold
        self.n_features_in_ = model.flow.features if isinstance(model, InspectionModel) else 3 * model.size**2
        self.__dict__.pop("feature_names_in_", None)  # of an earlier fit to rows

    def _rows(self, X: Any, **options: Any) -> Tensor:
        X = X.detach().cpu().numpy() if isinstance(X, Tensor) else X
        rows = validate_data(self, X, dtype=np.float64, **options)
        return torch.from_numpy(np.array(rows))  # a copy: torch takes neither read-only arrays nor negative strides

    def _texture(self, X: Any, kind: Kind, recipe: Recipe, *, double: Tensor | None, **options: Any) -> AnomalyModel:
        """Returns a texture model, or for ``"auto"`` what is better on synthetic defects."""
        side = max(TEXTURE_SIZE, self.size)
        large, _, shapes = square_pixels(X, side)
        texture = fit_texture_model(large, recipe, shapes=shapes, **options)
        if kind == "texture":
            return texture.model
        double = double if self.size == side else None
        return fit_sizes(large, (self.size,), recipe, double=double, others=[texture.candidate], **options).model

    def _images(self, X: Any) -> tuple[Tensor, Shapes]:
        if not are_images(X):
            raise ValueError("this detector was fitted to images: expected uint8 [n, h, w, 3] or paths" + found_in(X))
        pixels, _, shapes = square_pixels(X, self.model_.size)  # type: ignore[union-attr]
        return pixels, shapes
