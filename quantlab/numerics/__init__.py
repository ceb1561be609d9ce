"""Grids, scales, codes and bits: pure functions on tensors, which every method and kernel shares."""
