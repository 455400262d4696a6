"""Rankings of scores and anomaly maps described as text."""

from __future__ import annotations

from collections.abc import Sequence

from fastmaf.inspection.scoring.settings import AnomalyMapConfig, ScoreSettings
from fastmaf.inspection.selection.ranking import MapCandidate, ScoreCandidate


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
        source = presmooth = sigma = clip = top = ""
        if not s.needs_nll:
            source, sigma, clip = s.source, f"{s.sigma:g}", f"{s.clip:g}"
            presmooth = f"{s.presmooth_sigma:g}" if s.source == "whitened" else ""
            top = f"{s.top:g}" if s.kind == "map top" else ""
        hardest = sorted(candidate.by_kind.items(), key=lambda item: item[1])[:2]
        kinds = ", ".join(f"{kind} {area:.3f}" for kind, area in hardest)
        row = f"{s.kind:<14} {source:<9} {presmooth:>6} {sigma:>5} {clip:>5} {top:>6}"
        row += f" {candidate.image_auroc:>7.4f} {candidate.error:>6.4f}  {kinds}"
        lines.append(row + " (default)" * (s == default))
    for candidate in ranked:
        if candidate.settings == default:
            gap, error = ranked[0].image_auroc - candidate.image_auroc, ranked[0].error
            distance = "less" if gap <= error else "more"
            text = f"The default is {gap:.4f} below the best, {distance} than one standard error."
            lines += ["", text if gap else "The default is the best."]
    return "\n".join(lines)


def describe_maps(ranked: Sequence[MapCandidate], rows: int = 8) -> str:
    """Returns the comparison as text: the best candidates and the default."""
    lines = [
        "Anomaly maps: pixel AUROC and AU-PRO on the same images. The highest mean of both decides.",
        "",
        "factors power sigma   pixel  AU-PRO    mean",
    ]
    default = AnomalyMapConfig()
    for candidate in (*ranked[:rows], *(other for other in ranked[rows:] if other.config == default)):
        c = candidate.config
        row = f"{c.factors:>7} {c.power:>5g} {c.sigma:>5g}  {candidate.pixel_auroc:.4f}  {candidate.au_pro:.4f}  "
        lines.append(f"{row}{candidate.mean:.4f}{'  (default)' if c == default else ''}")
    return "\n".join(lines)
