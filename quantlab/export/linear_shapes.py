"""What each format asks of a linear's features, told from names and shapes alone. Needs no torch.

O output features, I input features.
"""

from collections.abc import Mapping

from quantlab.errors import SchemeError
from quantlab.schemes import Scheme, TensorSpec

__all__ = ["any_shape", "quanto_group", "shape_of_awq", "shape_of_gptq", "shape_of_quanto"]

GPTQ_MULTIPLE = 32
"""Inputs, and outputs, of a linear that gptq's words hold."""
AWQ_MULTIPLE = 8
"""Outputs whose codes share one of AWQ's words."""

Linears = Mapping[str, tuple[int, int]]
"""Name -> (O, I) of every linear that goes into low bits."""


def any_shape(scheme: Scheme, linears: Linears) -> None:
    """Formats that store rows of any length."""


def shape_of_gptq(scheme: Scheme, linears: Linears) -> None:
    """Refuse features that do not fill gptq's words.

    Raises:
        SchemeError: names the first linear that does not fit.
    """
    _check_multiples("gptq", linears, inputs=GPTQ_MULTIPLE, outputs=GPTQ_MULTIPLE)


def shape_of_awq(scheme: Scheme, linears: Linears) -> None:
    """Refuse features that do not fill AWQ's words and groups.

    Raises:
        SchemeError: names the first linear that does not fit.
    """
    assert scheme.weights is not None and scheme.weights.group_size, "the format's check asks for groups"
    _check_multiples("awq", linears, inputs=scheme.weights.group_size, outputs=AWQ_MULTIPLE)


def shape_of_quanto(scheme: Scheme, linears: Linears) -> None:
    """Refuse groups that are no multiple of those that quanto cuts by itself (see `quantlab/export/quanto.py`).

    Raises:
        SchemeError: names the first linear that does not fit.
    """
    spec = scheme.weights
    assert isinstance(spec, TensorSpec), "the format's check lets no other weights through"
    for name, (_, width) in linears.items() if spec.bits < 8 else ():
        size, own = quanto_group(width), spec.group_size or width
        if own % size:
            raise SchemeError(
                f"format quanto cuts {width} inputs in groups of {size}: {name} has groups of {own}, no multiple of "
                f'it. Use w{spec.bits}, one scale per channel, or add "*.{name.rpartition(".")[2]}" to skip.'
            )


def quanto_group(num_inputs: int) -> int:
    """Inputs that share a scale of qint4 and qint2, as quanto chooses them."""
    fits = [size for size in (128, 96, 64, 32) if num_inputs > 128 and num_inputs % size == 0]
    return fits[0] if fits else num_inputs


def _check_multiples(format_name: str, linears: Linears, *, inputs: int, outputs: int) -> None:
    for name, (rows, columns) in linears.items():
        if columns % inputs or rows % outputs:
            raise SchemeError(
                f"format {format_name} needs in_features in multiples of {inputs} and out_features in multiples of "
                f"{outputs}: {name} has in_features={columns} and out_features={rows}. "
                f'Add "*.{name.rpartition(".")[2]}" to skip, or use --format quantlab.'
            )
