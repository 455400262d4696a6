"""Which score, and with which constants: chosen on normals and on defects drawn onto them, never on a test image.

Every normal is scored by the fold's model that left it out, as it is and with a drawn defect. A candidate is judged by
its image AUROC over both, averaged over the kinds of defects, so that no kind counts for its number or its ease.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import fastmaf
from fastmaf.images.dataset import to_unit
from fastmaf.inspection.cross import CrossFit, without
from fastmaf.inspection.defects import KINDS, draw_defects
from fastmaf.inspection.scores import (
    ScoreSettings,
    Source,
    TermStatistics,
    image_scores,
    maps_of,
    terms_of,
)
from fastmaf.metrics.auroc import auroc

_TERMS: tuple[tuple[Source, float], ...] = (("whitened", 0.0), ("whitened", 0.7), ("flow", 0.0))

CANDIDATES: tuple[ScoreSettings, ...] = (
    ScoreSettings("nll", "flow"),
    ScoreSettings("typicality", "flow"),
    *(
        ScoreSettings("map maximum", source, grain, sigma, clip)
        for (source, grain), sigma, clip in itertools.product(_TERMS, (1.0, 1.5, 2.0, 3.0), (5.0, 10.0, 20.0))
    ),
    *(
        ScoreSettings("map top", source, grain, sigma, 10.0, top)
        for (source, grain), sigma, top in itertools.product(_TERMS, (1.0, 1.5, 2.0), (0.0025, 0.005, 0.01, 0.02))
    ),
)


@dataclass(frozen=True)
class Candidate:
    """A score with what it found: AUROC by kind of defect, and their mean with its standard error."""

    settings: ScoreSettings
    by_kind: dict[str, float]
    image_auroc: float
    error: float


@fastmaf.torch_defaults()
def choose(
    pixels: Tensor,
    cross: CrossFit,
    *,
    candidates: Iterable[ScoreSettings] = CANDIDATES,
    draws: int = 3,
    seed: int = 0,
    progress: bool = True,
) -> list[Candidate]:
    """Judges candidates on normals and drawn defects.

    Args:
        pixels: the normals that ``cross`` was fitted to, uint8 ``[n, 3, s, s]``.
        cross: the models of the folds.
        candidates: the scores to compare.
        draws: defects drawn onto each normal.
        seed: of the defects.
        progress: show a progress bar.

    Returns:
        The candidates, best first.
    """
    size = int(pixels.shape[-1])
    drawn = [draw_defects(pixels, seed=seed + i) for i in range(draws)]
    kinds = np.concatenate([np.asarray(one.kinds) for one in drawn])
    sets = [to_unit(part) for part in (pixels, *(one.pixels for one in drawn))]
    result: list[Candidate] = []
    terms, of = torch.empty(0), None
    # In the order of their terms, of which one kind at a time is held.
    candidates = sorted(candidates, key=lambda one: (one.source, one.grain))
    nll = torch.zeros(len(sets), len(pixels), dtype=torch.float64)
    if any(one.needs_nll for one in candidates):
        nll = cross.held_out(sets, lambda found: found.nll).double()
    for settings in tqdm(candidates, desc="judging scores", unit="score", disable=not progress, leave=False):
        if of != (settings.source, settings.grain):
            terms = cross.held_out(sets, partial(terms_of, settings=settings)).float()
            of = (settings.source, settings.grain)
        scores = _scored(terms, nll, cross, settings, size)
        normal, defect = scores[: len(pixels)], scores[len(pixels) :]
        by_kind = {kind: _auroc(normal, defect[kinds == kind]) for kind in KINDS if (kinds == kind).any()}
        areas = np.array(list(by_kind.values()))
        result.append(Candidate(settings, by_kind, float(areas.mean()), _error(normal, defect, kinds)))
    return sorted(result, key=lambda one: -one.image_auroc)


def explain(found: Sequence[Candidate], rows: int = 12) -> str:
    """Returns the comparison as text: the best candidates, the default and the plain scores, and what decides."""
    default = ScoreSettings()
    lines = [
        "Image AUROC of normals against the same normals with a drawn defect, each scored by a model that has not seen",
        "it, averaged over the kinds of defects; no image of a test set was read. The best mean decides. Where others",
        "lie within its standard error (from resampled normals), which one is taken matters little.",
        "",
        "score          terms     grain sigma  clip    top    mean  error  hardest kinds",
    ]
    others = [one for one in found[rows:] if one.settings == default or one.settings.kind in ("nll", "typicality")]
    for one in (*found[:rows], *others):
        s = one.settings
        is_map = s.kind.startswith("map")
        cells = [
            f"{s.kind:<14}",
            f"{s.source if is_map else '':<9}",
            f"{format(s.grain, 'g') if is_map and s.source == 'whitened' else '':>5}",
            f"{format(s.sigma, 'g') if is_map else '':>5}",
            f"{format(s.clip, 'g') if is_map else '':>5}",
            f"{format(s.top, 'g') if s.kind == 'map top' else '':>6}",
            f"{one.image_auroc:>7.4f}",
            f"{one.error:>6.4f}",
        ]
        hardest = sorted(one.by_kind.items(), key=lambda item: item[1])[:2]
        text = ", ".join(f"{kind} {area:.3f}" for kind, area in hardest)
        lines.append(" ".join(cells) + f"  {text}" + (" (the default)" if s == default else ""))
    best = next(one for one in found if one.settings == default) if any(o.settings == default for o in found) else None
    if best is not None:
        gap = found[0].image_auroc - best.image_auroc
        within = "within" if gap <= found[0].error else "more than"
        apart = f"The default lies {gap:.4f} below the best: {within} one standard error."
        lines += ["", apart if gap else "The default is the best."]
    return "\n".join(lines)


def _scored(terms: Tensor, nll: Tensor, cross: CrossFit, settings: ScoreSettings, size: int) -> np.ndarray:
    scores = torch.empty_like(nll)
    for fold in cross.folds:
        others = TermStatistics.of(without(terms[0], fold), without(nll[0], fold))
        for i in range(len(terms)):
            heat = maps_of(terms[i, fold], others, settings, size)
            scores[i, fold] = image_scores(heat, nll[i, fold], others, settings)
    return scores.flatten().numpy()


def _auroc(normal: np.ndarray, defect: np.ndarray) -> float:
    return auroc(np.concatenate([normal, defect]), np.arange(len(normal) + len(defect)) >= len(normal))


def _error(normal: np.ndarray, defect: np.ndarray, kinds: np.ndarray, resamples: int = 200) -> float:
    """Standard error of the mean AUROC over kinds, by resampling normals together with what was drawn onto them."""
    rng = np.random.default_rng(0)
    n, draws = len(normal), len(defect) // len(normal)
    means = []
    for _ in range(resamples):
        index = rng.integers(0, n, n)
        chosen = (np.arange(draws)[:, None] * n + index).ravel()
        own, of = defect[chosen], kinds[chosen]
        means.append(
            np.mean([_auroc(normal[index], own[of == kind]) for kind in np.unique(kinds) if (of == kind).any()])
        )
    return float(np.std(means))
