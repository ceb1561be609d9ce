"""How one matrix is stored, before there are any codes of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from quantlab.export.shards import TensorType
from quantlab.methods.solved import Quantized

__all__ = ["Plan"]


class Plan(NamedTuple):
    """Its entry in config.json, its tensors, and what makes them of codes."""

    entry: dict[str, Any]
    tensors: dict[str, TensorType]
    build: Callable[[Quantized], dict[str, Tensor]] = lambda quantized: {}
