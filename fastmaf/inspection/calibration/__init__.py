"""Conformal calibration: thresholds with a guaranteed false-alarm rate."""

from fastmaf.inspection.calibration.calibration import Calibration
from fastmaf.inspection.calibration.threshold import CalibrationError

__all__ = ["Calibration", "CalibrationError"]
