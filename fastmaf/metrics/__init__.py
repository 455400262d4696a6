"""Metrics of defect detection: areas under curves, thresholds, their uncertainty, and figures."""

from fastmaf.extras import require

require("inspection", "fastmaf.metrics")
