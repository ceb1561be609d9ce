"""Whether a scheme fits the shapes of a model's linears, told from names and headers alone."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import gcd

from quantlab.errors import SchemeError
from quantlab.schemes.scheme import Scheme

__all__ = ["check_shapes"]


def check_shapes(scheme: Scheme, linears: Mapping[str, tuple[int, int]], skip: Sequence[str] = ()) -> None:
    """Refuse group sizes that do not divide a linear's inputs.

    Args:
        linears: name -> (out_features, in_features) of every linear that the scheme would quantize.
        skip: dotted patterns of linears that stay at 16 bits.

    Raises:
        SchemeError: names the first linear that does not fit and the group size that would.
    """
    sizes = [spec.group_size for spec in (scheme.weights, scheme.activations) if spec and spec.group_size]
    for name, (_, in_features) in linears.items():
        if any(fnmatchcase(name, pattern) for pattern in skip):
            continue
        for size in sizes:
            if in_features % size:
                raise _does_not_divide(name, in_features, size, scheme.format)


def _does_not_divide(name: str, in_features: int, size: int, form: str | None) -> SchemeError:
    fits = gcd(in_features, size)
    instead = f"group_size={fits}" if fits > 1 else "one scale per channel"
    if form is not None:
        instead = f"a scheme without blocks of {size}, as {form} has them"
    return SchemeError(
        f"group_size must divide in_features: {name} has in_features={in_features}, group_size={size}. "
        f'Use {instead}, or add "*.{name.rpartition(".")[2]}" to skip.'
    )
