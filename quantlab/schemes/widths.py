"""Widths: the grid of each linear under a scheme whose name ends in `mixed`, from names alone."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from quantlab.errors import SchemeError, nearest
from quantlab.schemes.scheme import Scheme
from quantlab.schemes.spec import TensorSpec, WeightFormat

__all__ = ["check_widths", "weights_of", "width_name"]


def width_name(value: str) -> str:
    """The canonical name of a scheme that is of weights on a uniform grid and of nothing else.

    Raises:
        SchemeError: it is more, or no scheme.
    """
    scheme = Scheme.parse(value)
    if scheme != Scheme(scheme.weights) or scheme.format is not None:
        raise SchemeError(
            f"a width must be bits of weights and nothing else, as w8 or w3g64: {value!r} is more."
        )
    return scheme.name


def weights_of(name: str, scheme: Scheme, widths: Mapping[str, str]) -> TensorSpec | WeightFormat | None:
    """The grid of one linear, None for 16 bits: the scheme's, or if it is mixed, that of the last matching pattern."""
    matching = [width for pattern, width in widths.items() if scheme.mixed and fnmatchcase(name, pattern)]
    return Scheme.parse(matching[-1]).weights if matching else scheme.weights


def check_widths(scheme: Scheme, widths: Mapping[str, str], names: Sequence[str]) -> None:
    """Refuse widths that a mixed scheme cannot take.

    Args:
        names: of the linears that are to be quantized.

    Raises:
        SchemeError: there are none, a pattern matches nothing, the method cannot have one, or all stay at 16 bits.
    """
    if not scheme.mixed:
        return
    if not widths:
        raise SchemeError(
            f"{scheme.name} takes bits of some linears from quantize.widths: it is empty. `quantlab allocate` writes "
            "it, or leave '-mixed' out."
        )
    for pattern, width in widths.items():
        if not any(fnmatchcase(name, pattern) for name in names):
            hint = nearest(pattern, names) or f" There are {names[0]} and others."
            raise SchemeError(
                f"a pattern of quantize.widths must match a linear: {pattern!r} matches none.{hint}"
            )
        weights = Scheme.parse(width).weights
        if weights is not None:
            replace(scheme, weights=weights)  # raises where the method cannot have it
    if all(weights_of(name, scheme, widths) is None for name in names):
        raise SchemeError(
            f"a scheme must quantize some linear: quantize.widths leaves all of {scheme.name} at 16 bits."
        )
