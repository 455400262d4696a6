"""Ranking scores on normal images and synthetic defects, never on a test image.

Every normal image is scored by the model of the fold that left it out, both as it is and with a synthetic defect. A
candidate is ranked by its image AUROC over both, averaged over the kinds of defects, so that every kind counts equally.
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
from fastmaf.inspection.out_of_fold import OutOfFoldModels
from fastmaf.inspection.scoring.score import terms_of
from fastmaf.inspection.scoring.settings import ScoreSettings, Source
from fastmaf.inspection.synthetic_defects.draw import KINDS, draw_defects
from fastmaf.metrics.auroc import auroc

_TERMS: tuple[tuple[Source, float], ...] = (("whitened", 0.0), ("whitened", 0.7), ("flow", 0.0))

CANDIDATES: tuple[ScoreSettings, ...] = (
    ScoreSettings("nll", "flow"),
    ScoreSettings("typicality", "flow"),
    *(
        ScoreSettings("map maximum", source, presmooth, sigma, clip)
        for (source, presmooth), sigma, clip in itertools.product(_TERMS, (1.0, 1.5, 2.0, 3.0), (5.0, 10.0, 20.0))
    ),
    *(
        ScoreSettings("map top", source, presmooth, sigma, 10.0, top)
        for (source, presmooth), sigma, top in itertools.product(_TERMS, (1.0, 1.5, 2.0), (0.0025, 0.005, 0.01, 0.02))
    ),
)


@dataclass(frozen=True)
class ScoreCandidate:
    """A score with its AUROC by kind of defect, and their mean with its standard error."""

    settings: ScoreSettings
    by_kind: dict[str, float]
    image_auroc: float
    error: float


@fastmaf.torch_defaults()
def rank_scores(
    pixels: Tensor,
    models: OutOfFoldModels,
    *,
    candidates: Iterable[ScoreSettings] = CANDIDATES,
    draws: int = 3,
    seed: int = 0,
    progress: bool = True,
) -> list[ScoreCandidate]:
    """Ranks scores on normal images and synthetic defects.

    Args:
        pixels: the normal images that ``models`` were fitted to, uint8 ``[n, 3, s, s]``.
        models: the models of the folds.
        candidates: the scores to compare.
        draws: synthetic defects per normal image.
        seed: of the defects.
        progress: show a progress bar.

    Returns:
        The candidates, best first.
    """
    drawn = [draw_defects(pixels, seed=seed + i) for i in range(draws)]
    kinds = np.concatenate([np.asarray(defects.kinds) for defects in drawn])
    sets = [to_unit(part) for part in (pixels, *(defects.pixels for defects in drawn))]
    result: list[ScoreCandidate] = []
    # Grouped by terms, of which only one kind is held in memory at a time.
    ordered = sorted(candidates, key=_terms_key)
    nll = torch.zeros(len(sets), len(pixels), dtype=torch.float64)
    if any(settings.needs_nll for settings in ordered):
        nll = models.held_out(sets, lambda values: values.nll)
    with tqdm(total=len(ordered), desc="ranking scores", unit="score", disable=not progress, leave=False) as bar:
        for _, group in itertools.groupby(ordered, key=_terms_key):
            several = list(group)
            terms = models.held_out(sets, partial(terms_of, settings=several[0])).float()
            for settings in several:
                scores = models.scores(terms, nll, settings).flatten().numpy()
                normal, defect = scores[: len(pixels)], scores[len(pixels) :]
                by_kind = {kind: _auroc(normal, defect[kinds == kind]) for kind in KINDS if (kinds == kind).any()}
                mean = float(np.mean(list(by_kind.values())))
                result.append(ScoreCandidate(settings, by_kind, mean, _standard_error(normal, defect, kinds)))
                bar.update()
    return sorted(result, key=lambda candidate: -candidate.image_auroc)


def _terms_key(settings: ScoreSettings) -> tuple[str, float]:
    return settings.source, settings.presmooth_sigma


def describe_scores(ranked: Sequence[ScoreCandidate], rows: int = 12) -> str:
    """Returns the comparison as text: the best candidates, the default and the plain scores."""
    default = ScoreSettings()
    lines = [
        "Image AUROC of normal images against the same images with a synthetic defect, each scored by a model that",
        "has not seen it, averaged over the kinds of defects; no test image is read. The highest mean decides. The",
        "choice matters little among candidates within one standard error (from resampled normal images).",
        "",
        "score          terms  presmooth sigma  clip    top    mean  error  hardest kinds",
    ]
    others = [c for c in ranked[rows:] if c.settings == default or c.settings.needs_nll]
    for candidate in (*ranked[:rows], *others):
        s = candidate.settings
        is_map = not s.needs_nll
        cells = [
            f"{s.kind:<14}",
            f"{s.source if is_map else '':<9}",
            f"{format(s.presmooth_sigma, 'g') if is_map and s.source == 'whitened' else '':>6}",
            f"{format(s.sigma, 'g') if is_map else '':>5}",
            f"{format(s.clip, 'g') if is_map else '':>5}",
            f"{format(s.top, 'g') if s.kind == 'map top' else '':>6}",
            f"{candidate.image_auroc:>7.4f}",
            f"{candidate.error:>6.4f}",
        ]
        hardest = sorted(candidate.by_kind.items(), key=lambda item: item[1])[:2]
        text = ", ".join(f"{kind} {area:.3f}" for kind, area in hardest)
        lines.append(" ".join(cells) + f"  {text}" + (" (default)" if s == default else ""))
    for candidate in ranked:
        if candidate.settings == default:
            gap, error = ranked[0].image_auroc - candidate.image_auroc, ranked[0].error
            distance = "less" if gap <= error else "more"
            text = f"The default is {gap:.4f} below the best, {distance} than one standard error."
            lines += ["", text if gap else "The default is the best."]
    return "\n".join(lines)


def _auroc(normal: np.ndarray, defect: np.ndarray) -> float:
    return auroc(np.concatenate([normal, defect]), np.arange(len(normal) + len(defect)) >= len(normal))


def _standard_error(normal: np.ndarray, defect: np.ndarray, kinds: np.ndarray, resamples: int = 200) -> float:
    """Standard error of the mean AUROC over kinds, by resampling normal images together with their defects."""
    rng = np.random.default_rng(0)
    n, draws = len(normal), len(defect) // len(normal)
    means = []
    for _ in range(resamples):
        index = rng.integers(0, n, n)
        rows = (np.arange(draws)[:, None] * n + index).ravel()
        scores, of = defect[rows], kinds[rows]
        areas = [_auroc(normal[index], scores[of == kind]) for kind in np.unique(kinds) if (of == kind).any()]
        means.append(np.mean(areas))
    return float(np.std(means))
