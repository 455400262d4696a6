"""The score table of a labelled test set: every score of a model, and the baselines, on the same images.

Everything is compared with the default score and its anomaly maps on the same resamples of the test images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

import fastmaf
from fastmaf.images.dataset import ImageSet, to_unit
from fastmaf.images.progress import track
from fastmaf.images.reduce import reduced
from fastmaf.inspection.baselines import Baseline, all_baselines
from fastmaf.inspection.combined import CombinedModel
from fastmaf.inspection.features.model import FeatureModel
from fastmaf.inspection.framed import FramedModel
from fastmaf.inspection.interface import AnomalyModel
from fastmaf.inspection.map_shapes import squared
from fastmaf.inspection.masks import LabelledSet
from fastmaf.inspection.model import InspectionModel, Prediction
from fastmaf.inspection.pose import maps_turned_back
from fastmaf.inspection.posed import PosedModel
from fastmaf.inspection.scoring.float64_flow import Float64Flow, FlowValues
from fastmaf.inspection.scoring.score import image_scores, score_maps, terms_of
from fastmaf.inspection.scoring.settings import Kind
from fastmaf.inspection.tiled import TiledModel
from fastmaf.inspection.tiled_baselines import TiledBaseline, small_enough
from fastmaf.metrics.aupro import au_pro, compare_pixels
from fastmaf.metrics.auroc import PairedDifference, auroc, auroc_interval, paired_bootstrap
from fastmaf.metrics.results import NORMAL

_Scored: TypeAlias = tuple[str, str, np.ndarray, np.ndarray | None]
"""Name, kind, scores and anomaly maps."""


@dataclass(frozen=True, eq=False)
class TableRow:
    """One row of the table: a score of the model, or a baseline.

    Attributes:
        name: of the score.
        kind: ``"score"`` or ``"baseline"``.
        auroc, interval: image AUROC with its 95% interval.
        difference: paired difference to the default score; None for the default itself.
        pixel_auroc, au_pro: of its anomaly maps; None without maps or masks.
        pixel_difference: paired difference of the pixel AUROC to the default's.
        default: whether this is the score that the model uses.
    """

    name: str
    kind: str
    auroc: float
    interval: tuple[float, float]
    difference: PairedDifference | None
    pixel_auroc: float | None
    au_pro: float | None
    pixel_difference: PairedDifference | None
    default: bool


@fastmaf.torch_defaults()
def score_table(
    model: AnomalyModel,
    test: LabelledSet,
    prediction: Prediction,
    fold_models: Sequence[fastmaf.Flow] = (),
    *,
    seed: int = 0,
    progress: bool = True,
) -> list[TableRow]:
    """Returns the score table: the scores of a model, then the baselines fitted to ``test.normals``, if any.

    Args:
        model: the model to evaluate.
        test: the test set.
        prediction: the model's prediction for ``test.images``.
        fold_models: the models of the folds, for the score of their ensemble.
        seed: of the bootstrap.
        progress: show a progress bar.
    """
    images, side = test.images, prediction.anomaly_maps.shape[-1]
    scored = _model_scores(model, images, prediction, fold_models)
    if test.normals is not None:
        for baseline in track(all_baselines(), "scoring with baselines", "baseline", show=progress):
            scored.append(
                (baseline.name, "baseline", *_baseline(baseline, model, test.normals.pixels, images.pixels, side))
            )
    defect = np.array([label != NORMAL for label in images.labels])
    pixels = _pixel_metrics(scored, test, seed)
    rows = []
    for i, (name, kind, scores, _) in enumerate(scored):
        difference = None if i == 0 else paired_bootstrap(scores, scored[0][2], defect, seed=seed)
        interval = auroc_interval(scores, defect, 2000, seed)
        rows.append(TableRow(name, kind, auroc(scores, defect), interval, difference, *pixels[i], i == 0))
    return rows


def _baseline(
    baseline: Baseline, model: AnomalyModel, normals: Tensor, pixels: Tensor, side: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns scores of a baseline, of the tiles of a tiled model or of images of at most 128 pixels, and its maps,
    of this side unless they are stitched.
    """
    if isinstance(model, TiledModel):
        return TiledBaseline(baseline, model.parts[0].size, model.tiles).fit(normals).score(pixels)
    scores, maps = baseline.fit(small_enough(normals)).score(small_enough(pixels))
    return scores, None if maps is None else squared(maps, side)


def _pixel_metrics(
    scored: Sequence[_Scored], test: LabelledSet, seed: int
) -> list[tuple[float | None, float | None, PairedDifference | None]]:
    """Returns pixel AUROC, AU-PRO and difference to the first of each score, None if it has no maps or no masks."""
    usable = np.flatnonzero(test.masks.usable(test.images)).tolist()
    result: list[tuple[float | None, float | None, PairedDifference | None]] = [(None, None, None)] * len(scored)
    if usable:
        truth = [test.masks.masks[k] for k in usable]
        maps_of = {i: [maps[k] for k in usable] for i, (_, _, _, maps) in enumerate(scored) if maps is not None}
        areas, differences = compare_pixels(list(maps_of.values()), truth, seed=seed)
        for (i, maps), area, difference in zip(maps_of.items(), areas, differences, strict=True):
            result[i] = area, au_pro(maps, truth), difference if i else None
    return result


def _model_scores(
    model: AnomalyModel, images: ImageSet, prediction: Prediction, fold_models: Sequence[fastmaf.Flow]
) -> list[_Scored]:
    """Returns all scores of the model, its own first."""
    if isinstance(model, FramedModel):
        shapes = images.shapes or None
        framed = replace(images, pixels=model.seen(images.pixels, shapes), shapes=())
        of_part = _model_scores(model.part, framed, prediction, fold_models)
        return of_part[:1] + [
            (name, kind, scores, None if maps is None else model.maps_of(images.pixels, shapes, maps))
            for name, kind, scores, maps in of_part[1:]
        ]
    if isinstance(model, PosedModel):
        seen, places = model.seen(images.pixels)
        of_part = _model_scores(model.part, replace(images, pixels=seen, shapes=()), prediction, fold_models)
        # The first map is that of ``prediction``, turned back already.
        return of_part[:1] + [
            (name, kind, scores, None if maps is None else maps_turned_back(squared(maps, model.size), places))
            for name, kind, scores, maps in of_part[1:]
        ]
    if isinstance(model, InspectionModel):
        return _scores_of_pixels(model, images, prediction, fold_models)
    if isinstance(model, FeatureModel):
        return [(f"features of {model.extractor.label}", "score", prediction.scores, prediction.anomaly_maps)]
    if not isinstance(model, CombinedModel):
        return [("score", "score", prediction.scores, prediction.anomaly_maps)]
    name = "sum of standardised scores" if len(model.parts) > 1 else model.standards[0].name
    result: list[_Scored] = [(name, "score", prediction.scores, prediction.anomaly_maps)]
    if len(model.parts) > 1:
        of_parts = model.predictions(images.pixels, images.shapes or None, nll=False)
        for standard, part in zip(model.standards, of_parts, strict=True):
            result.append((standard.name, "score", part.scores, squared(part.anomaly_maps, model.size)))
    return result


def _scores_of_pixels(
    model: InspectionModel, images: ImageSet, prediction: Prediction, fold_models: Sequence[fastmaf.Flow]
) -> list[_Scored]:
    """Returns all scores of a model of pixels, its own first, and that of the ensemble of the fold models."""
    settings, nll = model.settings, torch.from_numpy(prediction.nll).to(model.device)
    names: dict[Kind, str] = {
        "nll": "NLL",
        "typicality": "typicality |NLL - mean|",
        "map top": f"map, mean of top {settings.top:.1%}",
        "map maximum": "map maximum",
    }

    def scored(name: str, maps: Tensor, kind: Kind) -> _Scored:
        scores = image_scores(maps, nll, model.statistics, replace(settings, kind=kind))
        return name, "score", scores.cpu().numpy(), None

    name, maps = names.pop(settings.kind), _score_maps(model.float64_flow, model, images)
    result: list[_Scored] = [(name, "score", prediction.scores, prediction.anomaly_maps)]
    result += [scored(other, maps, kind) for kind, other in names.items()]
    if fold_models and not settings.needs_nll:
        several = torch.stack([_score_maps(Float64Flow(flow), model, images) for flow in fold_models])
        result.append(scored(f"{name}, {len(fold_models)} folds", several.mean(dim=0), settings.kind))
    return result


def _score_maps(flow: Float64Flow, model: InspectionModel, images: ImageSet) -> Tensor:
    """Returns the score maps of images under the model's flow or a fold's."""
    parts = (to_unit(reduced(part, model.shape), model.channels) for part in images.pixels.split(64))
    batches = (FlowValues(flow, part.to(model.device)) for part in parts)
    terms = torch.cat([terms_of(values, model.settings, model.shape) for values in batches])
    return score_maps(terms, model.statistics, model.settings, model.shape)
