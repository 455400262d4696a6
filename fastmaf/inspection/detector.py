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
from torch import Tensor, nn

import fastmaf
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.detector_fit import ImageFit, fit_images
from fastmaf.inspection.detector_input import are_images, found_in, square_pixels
from fastmaf.inspection.features.candidate import fit_precomputed
from fastmaf.inspection.features.extractor import PRECOMPUTED, on_grid
from fastmaf.inspection.features.model import FeatureModel
from fastmaf.inspection.framed import seen_by
from fastmaf.inspection.interface import AnomalyModel, map_shape, maps_of, scores_of
from fastmaf.inspection.kinds import KINDS, Kind
from fastmaf.inspection.map_shapes import brought_to
from fastmaf.inspection.model import InspectionModel, Prediction, Shapes, load_inspection
from fastmaf.inspection.recipe import RANK, Recipe
from fastmaf.inspection.row_model import RowModel, fit_rows
from fastmaf.inspection.sizes import BUDGET, SIZES, sizes_of
from fastmaf.inspection.texture.model import TextureModel
from fastmaf.inspection.tiled import TiledModel

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
      sequence of paths of image files. They are resized, see ``size``;
    - or rows: finite numbers ``[n, D]``;
    - or, with ``features="precomputed"``, feature maps: ``[n, c, h, w]``, or a sequence of such.

    Args:
        size: images only: side in pixels of the square that each is resized to; with ``tiles`` of each tile. Where
            the images of an object are not square, they keep their aspect ratio, at the area of that square: those of
            4:3 become about 56 x 74 pixels at 64.
            ``"auto"`` fits models of 64 and 128 pixels, and of 256 from a budget of 300 s on, as far as the smallest
            image and the budget go, and takes the one, or the combination, that is best on synthetic defects; see
            ``fastmaf.inspection.sizes``. It is the choice of ``fastmaf inspect fit --size auto``.
        rank: factors of the whitening; fewer if the samples or columns do not support them. ``"auto"``: 600 for
            images, 800 where copies are turned, as far as memory goes; 400 for rows.
        blocks: images only: autoregressive blocks after the whitening; ``"auto"``: two if held-out images are more
            likely with them, else none. They lower the NLL that ``model_`` reports; the score does not use them: 0
            gives the same scores faster.
        steps: images only: training steps of the blocks.
        tiles: images only: for images much larger than a model. k > 1 resizes each image to ``tiled_size(size, k)``
            pixels, and fits a model to each of k × k overlapping tiles. An image is as anomalous as its most anomalous
            tile, compared with good images of that tile, and the threshold is one for images, not for tiles. k² times
            the time of one model.
        folds: K, at least 2; at most the number of samples is used.
        false_alarm: false-alarm rate on new normal samples, on average over calibration sets.
        confidence: None, or the probability with which this calibration set keeps that rate.
        kind: images only: ``"object"``, whose parts have a fixed place or shape; ``"texture"``, which looks the same
            everywhere: a density of local features, of which each image is seen at its own aspect ratio; or ``"auto"``:
            what the samples, and synthetic defects on them, call for. With ``features``, a texture joins them where
            that is better on synthetic defects. See ``fastmaf.inspection.kinds``.
        random_state: of folds and blocks. By default the same samples give the same model.
        verbose: images only: show a progress bar.
        features: images only: None for a model of pixels alone, fitted from scratch; ``"efficientnet-lite0"``, a
            pretrained network that ``fastmaf[features]`` brings; or any torch module that takes RGB on [0, 1], float32
            ``[n, 3, 256, 256]``, and returns feature maps ``[n, c, h, w]``, or several. Then a Gaussian of the features
            is fitted, too, and used alone, or together with the model of pixels if that is better on synthetic defects.
            ``"precomputed"``: X holds feature maps instead of images, and there is no model of pixels.
        pose: images only: ``"auto"`` turns objects that lie at any angle to one pose first, if the good images have one
            in common; ``"none"`` sees images as they are. See ``fastmaf.inspection.posed``.
        budget: with ``size="auto"``: seconds that the models may take. A further size is fitted only if it is expected
            to end within them.

    Attributes:
        model_: an ``AnomalyModel`` for images, usually ``InspectionModel``, or ``RowModel``.
        sizes_: images only: the sizes of the models of pixels that were chosen, ascending: one, several that are
            combined, or none if a texture or features are used alone.
        calibration_: held-out scores and their guarantee; ``print(detector.calibration_.describe())``.
        offset_: minus the threshold: ``decision_function = score_samples - offset_``.
        threshold_: samples whose ``anomaly_score`` is above are outliers, as in PyOD.
        decision_scores_: float64 [n], the ``anomaly_score`` of each training sample by a model that has not seen it,
            in the order of X: the scores behind the threshold. Not set by ``load``, as files hold them sorted.
        labels_: int64 [n], 1 for training samples above the threshold, else 0, as in PyOD; a few are expected.
        n_features_in_: D; for images the number of values of a resized one, 3 size² if it is a square, or a third of
            that if all images are grey.

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
        size: int | Literal["auto"] = 64,
        rank: int | Literal["auto"] = "auto",
        blocks: int | Literal["auto"] = "auto",
        steps: int = 200,
        tiles: int = 1,
        folds: int = 10,
        false_alarm: float = 0.05,
        confidence: float | None = None,
        kind: Kind = "object",
        random_state: int | np.random.RandomState | None = 0,
        verbose: bool = False,
        features: nn.Module | str | None = None,
        budget: float = BUDGET,
        pose: Literal["auto", "none"] = "auto",
    ) -> None:
        self.size = size
        self.rank = rank
        self.blocks = blocks
        self.steps = steps
        self.tiles = tiles
        self.folds = folds
        self.false_alarm = false_alarm
        self.confidence = confidence
        self.kind = kind
        self.random_state = random_state
        self.verbose = verbose
        self.features = features
        self.budget = budget
        self.pose = pose

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
        if isinstance(self.size, str) and self.size != "auto":
            raise ValueError(f"size must be 'auto' or a number of pixels; found {self.size!r}")
        if not self.budget >= 0:
            raise ValueError(f"budget must be at least 0 seconds; found {self.budget}")
        side = SIZES[0] if isinstance(self.size, str) else self.size
        recipe = Recipe(
            side, self.rank, blocks=self.blocks, steps=self.steps, folds=self.folds, seed=seed, pose=self.pose
        )
        if self.tiles < 1:
            raise ValueError(f"tiles must be at least 1; found {self.tiles}")
        labels = None if groups is None else [str(group) for group in groups]
        self.model_: AnomalyModel | RowModel
        if self.features == PRECOMPUTED:
            candidate = fit_precomputed(X, groups=labels, seed=seed)
            (known, _), *_ = candidate.known
            of_features = candidate.model()
            calibration = of_features.calibration.with_rate(self.false_alarm, self.confidence)
            self._use(of_features.with_calibration(calibration))
            scores = candidate.held_out([known]).scores[0]
        elif are_images(X):
            wanted = ImageFit(self.size == "auto", self.tiles, self.kind, self.features, self.budget, self.verbose)
            model, scores = fit_images(X, labels, recipe, wanted, self._warn_of_few)
            self._use(model.with_calibration(model.calibration.with_rate(self.false_alarm, self.confidence)))
        elif groups is not None:
            raise ValueError("groups are for images: rows are held out at random")
        elif self.features is not None:
            raise ValueError("features are of images: X holds rows" + found_in(X))
        else:
            rows = self._rows(X, ensure_min_samples=2)
            self._warn_of_few(len(rows), "samples")
            folds = min(self.folds, len(rows))
            self.model_, scores = fit_rows(rows, RANK if isinstance(self.rank, str) else self.rank, folds, seed)
            self.calibration_ = Calibration(scores, self.false_alarm, self.confidence, "k-fold", folds)
            self._set_threshold()
        self.decision_scores_ = scores
        self.labels_ = self.calibration_.is_anomalous(scores).astype(np.int64)
        return self

    @fastmaf.torch_defaults()
    def anomaly_score(self, X: Any) -> np.ndarray:
        """Returns anomaly scores, float64 [n], higher is more anomalous; for rows in nats."""
        check_is_fitted(self)
        if (of_features := self._of_precomputed(X)) is not None:
            return of_features.scores
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

    def predict_proba(self, X: Any) -> np.ndarray:
        """Returns ``p_values`` and one minus them, float64 [n, 2]: the columns normal and outlier of PyOD.

        The second is the share of normal samples that are expected to score lower; it is uniform over new normal
        samples, not the probability that a sample is an outlier, which would depend on how frequent outliers are.
        Outliers by ``predict`` have at least one minus the expected false-alarm rate.
        """
        p = self.p_values(X)
        return np.column_stack([p, 1 - p])

    @fastmaf.torch_defaults()
    def anomaly_map(self, X: Any) -> np.ndarray:
        """Returns anomaly maps of images, float32 [n, h, w], higher is more anomalous; each covers its whole image.

        They have the aspect ratio of the good images, and about size² pixels. Those of textures and of features alone
        are square: of at least 256 pixels a side, and of 64 with ``features="precomputed"``. Those of objects at any
        angle have the size at which images are turned, and are 0 in corners that are turned out of view.
        """
        check_is_fitted(self)
        if isinstance(self.model_, RowModel):
            raise ValueError("anomaly maps need images: this detector was fitted to rows")
        if (of_features := self._of_precomputed(X)) is not None:
            return of_features.anomaly_maps
        return brought_to(maps_of(self.model_, *self._images(X)), map_shape(self.model_))

    @fastmaf.torch_defaults()
    def save(self, path: str | Path, *, card: str | Path | None = None) -> None:
        """Writes a detector of images to one safetensors file, which the command line can read.

        One with features of a module of your own cannot be saved.

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
        recipe = model.about.get("recipe", model.about.get("tile_recipe", {}))
        given = {**recipe, **model.about.get("asked", {})}
        known = {name: given[name] for name in ("rank", "blocks", "steps", "folds", "pose") if name in given}
        rate = {name: getattr(model.calibration, name) for name in ("false_alarm", "confidence")}
        known["kind"] = "texture" if isinstance(model, TextureModel) else "object"
        tiles = model.tiles if isinstance(model, TiledModel) else 1
        size = recipe.get("size", model.size)
        configuration = model.about.get("configuration", {})
        if configuration.get("size") == "auto":
            size, known["budget"] = "auto", configuration.get("budget", BUDGET)
        detector = cls(size=size, tiles=tiles, random_state=recipe.get("seed", 0), **known, **rate)
        detector._use(model)
        return detector

    def _warn_of_few(self, available: int, unit: str) -> None:
        """Warns, before the work, where the false-alarm rate needs more samples or groups."""
        planned = Calibration(np.zeros(max(available, 1)), self.false_alarm, self.confidence, "split")
        if not planned.attainable:
            text = f"a false-alarm rate of {self.false_alarm:g} needs {planned.min_samples} {unit}; found {available}"
            warnings.warn(text, stacklevel=6)

    def _of_precomputed(self, X: Any) -> Prediction | None:
        """Returns the prediction for feature maps, if the detector was fitted to such."""
        model = self.model_
        if not isinstance(model, FeatureModel) or model.extractor.network is not None:
            return None
        return model.predict_features(on_grid(X))

    def _use(self, model: AnomalyModel) -> None:
        self.model_, self.calibration_ = model, model.calibration
        self._set_threshold()
        self.sizes_ = sizes_of(model)
        seen = seen_by(model)
        self.n_features_in_ = seen.flow.features if isinstance(seen, InspectionModel) else 3 * seen.size**2
        self.__dict__.pop("feature_names_in_", None)  # of an earlier fit to rows

    def _set_threshold(self) -> None:
        self.threshold_ = self.calibration_.threshold
        self.offset_ = -self.threshold_

    def _rows(self, X: Any, **options: Any) -> Tensor:
        X = X.detach().cpu().numpy() if isinstance(X, Tensor) else X
        rows = validate_data(self, X, dtype=np.float64, **options)
        return torch.from_numpy(np.array(rows))  # a copy: torch takes neither read-only arrays nor negative strides

    def _images(self, X: Any) -> tuple[Tensor, Shapes]:
        if not are_images(X):
            raise ValueError("this detector was fitted to images: expected uint8 [n, h, w, 3] or paths" + found_in(X))
        pixels, _, shapes = square_pixels(X, self.model_.size)  # type: ignore[union-attr]
        return pixels, shapes
