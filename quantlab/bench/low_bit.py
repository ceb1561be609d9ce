"""A folder of low bits as quantlab runs it fastest: in bfloat16, on packed kernels where they take its grid."""

from collections import Counter
from pathlib import Path
from typing import Any

from quantlab.errors import SchemeError
from quantlab.layers.linear import QuantLinear
from quantlab.models.low_bit import load_low_bit

__all__ = ["load_packed"]


def load_packed(path: Path) -> tuple[Any, str]:
    """The model of a folder in low bits, and on which kernels its linears run.

    A grid that no packed kernel takes runs as the scheme runs elsewhere, and the kernels' names say so.

    Raises:
        CheckpointError: the folder is in a format that quantlab does not read, or damaged.
    """
    try:
        model = load_low_bit(path, dtype="bfloat16", device="cpu", kernel="packed").model
    except SchemeError:
        model = load_low_bit(path, dtype="bfloat16", device="cpu").model
    kernels = Counter(module.kernel for module in model.modules() if isinstance(module, QuantLinear))
    return model, ", ".join(["bfloat16", *(f"{count} x {name}" for name, count in sorted(kernels.items()))])
