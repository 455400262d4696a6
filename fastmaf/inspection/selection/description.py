"""Rankings of scores and anomaly maps: as text, and as JSON types for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fastmaf.inspection.scoring.settings import AnomalyMapConfig, ScoreSettings
from fastmaf.inspection.selection.ranking import MapCandidate, ScoreCandidate
from fastmaf.io.wording import count

_SCORES, _MAPS = 12, 8  # rows of a table, besides the default


@dataclass(frozen=True)
class Selection:
    """Scores and anomaly maps, each ranked on good images and synthetic defects, the best first.

    Attributes:
        images: number of good images.
        draws: synthetic defects per good image.
        scores, maps: the candidates.
    """

    images: int
    draws: int
    scores: tuple[ScoreCandidate, ...]
    maps: tuple[MapCandidate, ...]

    def describe(self) -> str:
        """Returns both rankings as tables, with their columns explained."""
        drawings = count(self.draws, "drawing")
        head = (
            f"{count(self.images, 'good image')}, without and with a synthetic defect ({drawings} of each);\n"
            "each is scored by a model that has not seen it; no test image is read"
        )
        return "\n\n".join([head, describe_scores(self.scores), describe_maps(self.maps)])

    def to_json(self) -> dict[str, Any]:
        """Returns all candidates with their settings and metrics as JSON types, the best first."""
        default, default_map = ScoreSettings(), AnomalyMapConfig()
        return {
            "images": self.images,
            "draws": self.draws,
            "scores": [{**asdict(c), "default": c.settings == default} for c in self.scores],
            "maps": [{**asdict(c), "mean": c.mean, "default": c.config == default_map} for c in self.maps],
        }


def describe_scores(ranked: tuple[ScoreCandidate, ...]) -> str:
    """Returns a table of the best scores, the default and the plain NLL scores."""
    default = ScoreSettings()
    lines = ["score          terms     presmooth  sigma  clip     top  image AUROC  std. error  hardest defects"]
    others = [c for c in ranked[_SCORES:] if c.settings == default or c.settings.needs_nll]
    for candidate in (*ranked[:_SCORES], *others):
        s = candidate.settings
        source = presmooth = sigma = clip = top = ""
        if not s.needs_nll:
            source, sigma, clip = s.source, f"{s.sigma:g}", f"{s.clip:g}"
            presmooth = f"{s.presmooth_sigma:g}" if s.source != "flow" else ""
            top = f"{s.top:.2%}" if s.kind == "map top" else ""
        hardest = sorted(candidate.by_kind.items(), key=lambda item: item[1])[:2]
        kinds = ", ".join(f"{kind} {area:.3f}" for kind, area in hardest)
        row = f"{s.kind:<14} {source:<9} {presmooth:>9} {sigma:>6} {clip:>5} {top:>7}"
        row += f" {candidate.image_auroc:>12.4f} {candidate.error:>11.4f}  {kinds}"
        lines.append(row + " (default)" * (s == default))
    lines += [
        "",
        "score: NLL; typicality, its distance from the mean NLL; maximum or mean of the top pixels of the score map",
        "terms: what the score map is made of: whitened pixels or values, or each value's share of the NLL of the flow",
        "presmooth, sigma: width in pixels of the smoothing of the values before squaring, and of the map",
        "clip: largest value of one term; top: share of the pixels that is averaged",
        "image AUROC: mean over the kinds of defects; within one standard error of the best is about as good",
    ]
    for candidate in ranked:
        if candidate.settings == default:
            gap, error = ranked[0].image_auroc - candidate.image_auroc, ranked[0].error
            distance = "less" if gap <= error else "more"
            text = f"the default is {gap:.4f} below the best, {distance} than one standard error"
            lines.append(text if gap else "the default is the best")
    return "\n".join(lines)


def describe_maps(ranked: tuple[MapCandidate, ...]) -> str:
    """Returns a table of the best anomaly maps and the default."""
    lines = ["factors  power  sigma  pixel AUROC  AU-PRO    mean"]
    default = AnomalyMapConfig()
    for candidate in (*ranked[:_MAPS], *(other for other in ranked[_MAPS:] if other.config == default)):
        c = candidate.config
        row = f"{c.factors:>7} {c.power:>6g} {c.sigma:>6g} {candidate.pixel_auroc:>12.4f} {candidate.au_pro:>7.4f}"
        lines.append(f"{row} {candidate.mean:>7.4f}{'  (default)' if c == default else ''}")
    lines += [
        "",
        "factors: number of the whitening's factors that are subtracted; the map is what remains",
        "power: unit of the map, from standard deviations of the noise (0) to pixel values (1); sigma: its smoothing",
        "pixel AUROC, AU-PRO: how well the map marks defective pixels and regions; the mean of both decides",
    ]
    return "\n".join(lines)
