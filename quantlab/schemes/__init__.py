"""Schemes: what is quantized and how, and the names by which people say it. No torch."""

from quantlab.schemes.catalogue import METHODS, SCHEMES, TRANSFORMS, WEIGHT_FORMATS
from quantlab.schemes.scheme import Scheme
from quantlab.schemes.shapes import check_shapes
from quantlab.schemes.spec import Granularity, TensorSpec, WeightFormat
from quantlab.schemes.widths import check_widths, weights_of, width_name

__all__ = [
    "METHODS",
    "SCHEMES",
    "TRANSFORMS",
    "WEIGHT_FORMATS",
    "Granularity",
    "Scheme",
    "TensorSpec",
    "WeightFormat",
    "check_shapes",
    "check_widths",
    "weights_of",
    "width_name",
]
