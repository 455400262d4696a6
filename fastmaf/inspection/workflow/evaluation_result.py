"""What an evaluation tells its user: as a table, and as JSON types for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fastmaf.images.names import visible
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.evaluate import TableRow
from fastmaf.io.safe_json import finite
from fastmaf.metrics.auroc import PairedDifference
from fastmaf.metrics.intervals import rate_interval
from fastmaf.metrics.results import NORMAL

_KINDS = {"score": "score", "baseline": "control"}  # the values in metrics.json, unchanged since its first version
_COLUMNS = (
    "image AUROC: probability that a defective image scores higher than a good one, and its 95% interval",
    "minus this model: interval of the difference to the score of this model; below 0 is worse",
)
_PIXEL_COLUMNS = ("pixel AUROC, AU-PRO: how well the anomaly map marks defective pixels, and whole defective regions",)


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """The results of a model on a labelled test set.

    Attributes:
        model: name of the model file.
        calibration: of the model.
        rows: the score table.
        alarms: (images, images called anomalous) of each class, "good" first.
    """

    model: str
    calibration: Calibration
    rows: tuple[TableRow, ...]
    alarms: Mapping[str, tuple[int, int]]

    def describe(self) -> str:
        """Returns the table as text for a terminal, its columns explained, and the verdicts by class."""
        wide = max(len(row.name) for row in self.rows)
        lines = [
            f"{'':<{wide}}  {a:>5}  {b:<14}  {c:<16}  {d:>5}  {e:<16}  {f}".rstrip()
            for a, b, c, d, e, f in (
                ("image", "95%", "minus this", "pixel", "minus this", ""),
                ("AUROC", "interval", "model, 95%", "AUROC", "model, 95%", "AU-PRO"),
            )
        ]
        for row in self.rows:
            low, high = row.interval
            pixel, pro = ("" if value is None else f"{value:.3f}" for value in (row.pixel_auroc, row.au_pro))
            minus = "(this model)" if row.default else _interval(row.difference)
            line = f"{row.name:<{wide}}  {row.auroc:>5.3f}  {low:.3f} to {high:.3f}  {minus:<16}  {pixel:>5}"
            lines.append(f"{line}  {_interval(row.pixel_difference):<16}  {pro:>6}".rstrip())
        lines += ["", *_COLUMNS]
        if any(row.pixel_auroc is not None for row in self.rows):
            lines += _PIXEL_COLUMNS
        lines += [*self._better_baselines(), "", f"verdicts at the threshold {self.calibration.threshold:.6g}:"]
        for label, (n, count) in self.alarms.items():
            verdict = "called anomalous (false alarms)" if label == NORMAL else "found"
            low, high = rate_interval(count, n)
            lines.append(f"{visible(label)}: {count:,} of {n:,} {verdict}, 95% interval {low:.1%} to {high:.1%}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of metrics.json; numbers that are not finite are None."""
        return {
            "model": self.model,
            "threshold": finite(self.calibration.threshold),
            "false_alarm": self.calibration.false_alarm,
            "expected_rate": self.calibration.expected_rate,
            "scores": [{**asdict(row), "kind": _KINDS[row.kind]} for row in self.rows],
            "classes": {
                label: {"images": n, "anomalous": count, "interval": rate_interval(count, n)}
                for label, (n, count) in self.alarms.items()
            },
        }

    def _better_baselines(self) -> list[str]:
        """Returns a line for each metric in which a baseline beats the model."""
        (default,), lines = [row for row in self.rows if row.default], []
        for metric, name in (("image AUROC", "auroc"), ("pixel AUROC", "pixel_auroc"), ("AU-PRO", "au_pro")):
            values = {row.name: getattr(row, name) for row in self.rows if row.kind == "baseline"}
            least = getattr(default, name)
            better = [baseline for baseline, value in values.items() if None not in (least, value) and value > least]
            if better:
                lines.append(f"baselines with a higher {metric} than this model: {', '.join(better)}")
        return lines


def _interval(difference: PairedDifference | None) -> str:
    return "" if difference is None else f"{difference.low:+.3f} to {difference.high:+.3f}"
