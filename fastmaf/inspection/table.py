"""The score table of a labelled test set: every score of a model, and the controls, on the same images.

The controls are fitted to the same good images, and everything is compared with the default score and its heat maps on
the same resamples of the test images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import fastmaf
from fastmaf.images.dataset import ImageSet, to_unit
from fastmaf.images.names import visible
from fastmaf.inspection.controls import controls
from fastmaf.inspection.float64 import Evaluated, Float64Flow
from fastmaf.inspection.masks import Masks
from fastmaf.inspection.metrics import (
    PairedDifference,
    au_pro,
    auroc,
    auroc_interval,
    compare_pixels,
    paired_bootstrap,
)
from fastmaf.inspection.model import Assessment, InspectionModel
from fastmaf.inspection.scores import ScoreSettings, image_scores, maps_of, terms_of
from fastmaf.metrics.results import NORMAL

_Found: TypeAlias = tuple[str, str, np.ndarray, np.ndarray | None]


@dataclass(frozen=True, eq=False)
class Line:
    """One row of the table: a score of the model, or a control.

    Attributes:
        name: of the score.
        kind: ``"score"`` or ``"control"``.
        auroc, interval: of images, with its 95 % bootstrap interval.
        difference: to the default score, paired; None for that itself.
        pixel_auroc, au_pro: of its maps; None without maps or masks. The default score's are the heat maps.
        pixel_difference: of the pixel AUROC to the heat maps', paired.
        default: this is the score that the model gives.
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


def scores_of(model: InspectionModel) -> list[tuple[str, ScoreSettings]]:
    """The scores that a model can give, by name, its own first."""
    own = model.settings
    others = [
        ScoreSettings("nll"),
        ScoreSettings("typicality"),
        replace(own, kind="map top"),
        replace(own, kind="map maximum"),
    ]
    return [(name_of(settings), settings) for settings in (own, *(one for one in others if one.kind != own.kind))]


def name_of(settings: ScoreSettings) -> str:
    """A score's name for people."""
    names = {
        "nll": "NLL",
        "typicality": "typicality |NLL - mean|",
        "map maximum": "map maximum",
        "map top": f"map, mean of top {settings.top:.1%}",
    }
    return names[settings.kind]


@fastmaf.torch_defaults()
def table(
    model: InspectionModel,
    images: ImageSet,
    assessment: Assessment,
    masks: Masks,
    normals: ImageSet | None,
    members: Sequence[fastmaf.Flow] = (),
    *,
    seed: int = 0,
    progress: bool = True,
) -> list[Line]:
    """Returns the score table: the scores of a model, then the controls fitted to ``normals``.

    Args:
        model, images: what is judged, and on what.
        assessment: what the model says of the images.
        masks: of their defects.
        normals: what controls are fitted to; None for no controls.
        members: the models of the folds, for the score of their ensemble.
        seed: of the bootstrap.
        progress: show a progress bar.
    """
    found = _scores(model, images, assessment, members)
    if normals is not None:
        for control in tqdm(controls(), desc="controls", disable=not progress, leave=False):
            found.append((control.name, "control", *control.fit(normals.pixels).score(images.pixels)))
    defect = np.array([label != NORMAL for label in images.labels])
    pixels = _pixels(found, masks, images, seed)
    lines = []
    for i, (name, kind, scores, _) in enumerate(found):
        difference = None if i == 0 else paired_bootstrap(scores, found[0][2], defect, seed=seed)
        interval = auroc_interval(scores, defect, 2000, seed)
        lines.append(Line(name, kind, auroc(scores, defect), interval, difference, *pixels[i], i == 0))
    return lines


def _pixels(
    found: Sequence[_Found], masks: Masks, images: ImageSet, seed: int
) -> list[tuple[float | None, float | None, PairedDifference | None]]:
    """Returns pixel AUROC, AU-PRO and difference to the first of each score, None where it has no maps or no masks."""
    judged = np.flatnonzero(masks.usable(images)).tolist()
    result: list[tuple[float | None, float | None, PairedDifference | None]] = [(None, None, None)] * len(found)
    if judged:
        truth = [masks.masks[k] for k in judged]
        several = {i: [maps[k] for k in judged] for i, (_, _, _, maps) in enumerate(found) if maps is not None}
        areas, differences = compare_pixels(list(several.values()), truth, seed=seed)
        for (i, own), area, apart in zip(several.items(), areas, differences, strict=True):
            result[i] = area, au_pro(own, truth), apart if i else None
    return result


def _scores(
    model: InspectionModel, images: ImageSet, assessment: Assessment, members: Sequence[fastmaf.Flow]
) -> list[_Found]:
    """Returns name, kind, scores and maps of each score that the model gives, its own first."""
    own, terms = model.settings, _terms(model.float64_flow, model, images)
    nll = torch.from_numpy(assessment.nll).to(model.device)
    heat = maps_of(terms, model.statistics, own, model.size)

    def scored(settings: ScoreSettings, heat: Tensor) -> np.ndarray:
        return image_scores(heat, nll, model.statistics, settings).cpu().numpy()

    first, *others = scores_of(model)
    result: list[_Found] = [(first[0], "score", assessment.scores, assessment.maps)]
    result += [(name, "score", scored(settings, heat), None) for name, settings in others]
    if members and own.kind.startswith("map"):
        parts = (_terms(Float64Flow(flow), model, images) for flow in members)
        several = torch.stack([maps_of(part, model.statistics, own, model.size) for part in parts])
        result.append((f"{first[0]}, {len(members)} folds", "score", scored(own, several.mean(dim=0)), None))
    return result


def _terms(flow: Float64Flow, model: InspectionModel, images: ImageSet) -> Tensor:
    """Returns terms ``[n, D]`` of images by a flow, the model's own or a fold's."""
    parts = (Evaluated(flow, to_unit(part).to(model.device)) for part in images.pixels.split(64))
    return torch.cat([terms_of(part, model.settings) for part in parts])


def format_lines(lines: Sequence[Line], called: Mapping[str, tuple[int, int]]) -> str:
    """The table as plain text for a terminal, and how many images of each class were called anomalous."""
    wide = max(len(line.name) for line in lines)
    head = f"{'':<{wide}}  {'AUROC':>6}  {'95% interval':<14}  {'to default':>10}  {'95% interval':<16}"
    text = [f"{head}  {'pixel':>5}  {'95% to default':<16}  AU-PRO"]
    for line in lines:
        low, high = line.interval
        row = f"{line.name:<{wide}}  {line.auroc:>6.3f}  {low:.3f} - {high:.3f}   "
        if line.difference is None:
            row += f"{'default':>10}  {'':<16}"
        else:
            d = line.difference
            row += f"{d.difference:>+10.3f}  {d.low:+.3f} to {d.high:+.3f}"
        pixel, pro = ("" if value is None else f"{value:.3f}" for value in (line.pixel_auroc, line.au_pro))
        apart = line.pixel_difference
        interval = "" if apart is None else f"{apart.low:+.3f} to {apart.high:+.3f}"
        text.append(f"{row}  {pixel:>5}  {interval:<16}  {pro:>6}".rstrip())
    default = next(line for line in lines if line.default)
    for what, value in (("AUROC", "auroc"), ("pixel AUROC", "pixel_auroc"), ("AU-PRO", "au_pro")):
        own = getattr(default, value)
        controls_of = [(line.name, getattr(line, value)) for line in lines if line.kind == "control"]
        winners = [name for name, found in controls_of if None not in (own, found) and found > own]
        if winners:
            text.append(f"higher {what} here: the control {', '.join(winners)}")
    text.append("")
    text += [f"{visible(label)}: {alarms} of {n} called anomalous" for label, (n, alarms) in called.items()]
    return "\n".join(text)
