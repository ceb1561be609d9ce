"""FORMATS: what a checkpoint can be written as, and which schemes each format can express. Needs no torch.

Adding a format is a line here and a module beside this one. The module offers

    layout(model, scheme, swapped, dtype) -> Layout     (`quantlab.export.shards`)

and is imported only when something is written.
"""

from collections.abc import Callable
from dataclasses import dataclass

from quantlab.errors import ConfigError, SchemeError, nearest
from quantlab.schemes import Scheme, TensorSpec

__all__ = ["FORMATS", "Format", "find_format"]


@dataclass(frozen=True)
class Format:
    """A way to store low-bit weights, and what it can hold."""

    name: str
    description: str
    """One line for `quantlab list formats`."""
    schemes: str
    """The schemes that it can express, as an error names them."""
    module: str
    """Where its writer is."""
    refusal: Callable[[Scheme], str | None]
    """What the format cannot hold of a scheme, or None when it holds all of it."""

    def check(self, scheme: Scheme) -> None:
        """Refuse a scheme that the format cannot express.

        Raises:
            SchemeError: says what does not fit, and which schemes do.
        """
        reason = self.refusal(scheme)
        if reason is not None:
            raise SchemeError(
                f"format {self.name} cannot hold scheme {scheme.name}: {reason}. It holds {self.schemes}."
            )


def find_format(name: str) -> Format:
    """The format of that name.

    Raises:
        ConfigError: no such format; the nearest known one is named.
    """
    if name not in FORMATS:
        hint = nearest(name.lower(), FORMATS) or f" Known formats: {', '.join(FORMATS)}."
        raise ConfigError(f"unknown format {name!r}.{hint}")
    return FORMATS[name]


def _beyond_compressed_tensors(scheme: Scheme) -> str | None:
    """What pack-quantized (weights only) and int-quantized (w8a8) cannot hold of a scheme."""
    if scheme.sites or scheme.head_sites or scheme.lambdas or scheme.hidden:
        return "a folder of weights carries no quantized attention, cache or hidden states"
    if not isinstance(scheme.weights, TensorSpec):
        return f"its weights are {scheme.format}" if scheme.format else "it leaves the weights at 16 bits"
    if scheme.method != "rtn" or scheme.transforms or scheme.mixed:
        return "this version writes weights that are rounded to nearest, all of one width"
    if scheme.weights.granularity not in ("channel", "group"):
        return "weights need a scale per channel or per group"
    if not scheme.weights.symmetric:
        return "transformers does not load this format's packed zero points"
    if scheme.activations is None:
        return None
    activations = scheme.activations
    if (activations.bits, activations.granularity, activations.symmetric) != (8, "row", True):
        return "activations go with it at 8 bits, symmetric, with a dynamic scale per token"
    if (scheme.weights.bits, scheme.weights.granularity) != (8, "channel"):
        return "8-bit activations go with 8-bit weights and a scale per channel"
    return None


FORMATS: dict[str, Format] = {
    "compressed-tensors": Format(
        name="compressed-tensors",
        description="symmetric weights of 2 to 8 bits per channel or group (w4, w6g64, ...), and w8a8; "
        "loaded by transformers and vLLM",
        schemes="symmetric weights of 2 to 8 bits per channel or group (w4, w6g64, ...) and w8a8",
        module="quantlab.export.compressed_tensors",
        refusal=_beyond_compressed_tensors,
    ),
}
"""Every format by its name."""
