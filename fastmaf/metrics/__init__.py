"""Metrics of detection: areas under curves, thresholds, and their uncertainty."""
