"""Metrics of defect detection: areas under curves, thresholds, their uncertainty, and figures."""
