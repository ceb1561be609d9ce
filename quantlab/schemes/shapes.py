"""Whether a scheme fits the shapes of a model's linears, told from names and headers alone."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import gcd

from quantlab.errors import SchemeError
from quantlab.schemes.scheme import Scheme
from quantlab.schemes.widths import weights_of

__all__ = ["check_shapes"]


def check_shapes(
    scheme: Scheme,
    linears: Mapping[str, tuple[int, int]],
    skip: Sequence[str] = (),
    widths: Mapping[str, str] | None = None,
) -> None:
    """Refuse group sizes that do not divide a linear's inputs.

    Args:
        linears: name -> (out_features, in_features) of every linear that the scheme would quantize.
        skip: dotted patterns of linears that stay at 16 bits.
        widths: of a mixed scheme, pattern -> weights.

    Raises:
        SchemeError: names the first linear that does not fit and the group size that would.
    """
    for name, (_, in_features) in linears.items():
        if any(fnmatchcase(name, pattern) for pattern in skip):
            continue
        weights = weights_of(name, scheme, widths or {})
        for size in (spec.group_size for spec in (weights, scheme.activations) if spec and spec.group_size):
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
