"""report.html: what a model, its threshold and its test images amount to, as one file that needs nothing else."""

from fastmaf.inspection.report.content import (
    Absent,
    Count,
    Data,
    Exhibit,
    Fold,
    Gallery,
    Outcome,
    Report,
    Samples,
    ScoreRow,
    Threshold,
    Timing,
    Training,
    TrainingPoint,
)
from fastmaf.inspection.report.findings import Cases, worst_cases
from fastmaf.inspection.report.page import write_report

__all__ = [
    "Absent",
    "Cases",
    "Count",
    "Data",
    "Exhibit",
    "Fold",
    "Gallery",
    "Report",
    "Samples",
    "ScoreRow",
    "Outcome",
    "Threshold",
    "Timing",
    "Training",
    "TrainingPoint",
    "worst_cases",
    "write_report",
]
