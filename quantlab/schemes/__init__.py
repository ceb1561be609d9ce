"""Schemes: what is quantized and how, and the names by which people say it."""

from quantlab.schemes.old import SCHEMES, Granularity, Scheme, TensorSpec, check_shapes

__all__ = ["SCHEMES", "Granularity", "Scheme", "TensorSpec", "check_shapes"]
