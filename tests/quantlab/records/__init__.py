"""Tests of quantlab.records."""
