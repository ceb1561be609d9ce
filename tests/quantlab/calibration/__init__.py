"""Tests of quantlab.calibration."""
