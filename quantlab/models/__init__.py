"""Checkpoints: found, inspected without torch, and loaded."""
