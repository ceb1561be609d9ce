"""Tests of weight methods."""
