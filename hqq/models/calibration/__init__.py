"""Quantising with the inputs that layers see: of text the model writes itself, of random tokens, or of given data."""

from __future__ import annotations

from hqq.models.calibration.settings import Calibration, CalibrationLike

__all__ = ["Calibration", "CalibrationLike"]
