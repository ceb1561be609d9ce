"""Tests of quantlab.solving."""
