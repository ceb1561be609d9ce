"""Specs: how one kind of tensor is quantized."""

from dataclasses import dataclass
from typing import Literal, get_args

from quantlab.errors import SchemeError

__all__ = ["LETTERS", "LETTER_OF", "Granularity", "TensorSpec", "WeightFormat"]

Granularity = Literal["tensor", "map", "channel", "group", "row", "head"]

LETTERS: dict[str, Granularity] = {
    "t": "tensor",
    "m": "map",
    "c": "channel",
    "g": "group",
    "r": "row",
    "h": "head",
}
"""The letter of each granularity in a name."""
LETTER_OF = {granularity: letter for letter, granularity in LETTERS.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A uniform grid of 2^bits codes, one scale per `granularity`."""

    bits: int
    """Bits that a value carries, 2..8."""
    granularity: Granularity
    """What shares a scale; the table in `quantlab.schemes.places` says what each word means for each kind of tensor."""
    group_size: int | None = None
    """Neighbours along the input that share a scale; given exactly when granularity is "group"."""
    symmetric: bool = True
    """True: scale = absmax / (2^(bits-1) - 1), or max / (2^bits - 1) of what is never negative (p, d). False: scale and
    zero point from min and max."""
    static: bool = False
    """Scales from calibration data instead of from the values themselves."""
    map: Literal[1, 2] | None = None
    """Of differential attention, the one map that is quantized: 1 the added, 2 the subtracted one; None: all."""
    window: int | None = None
    """Of the cache: each query sees its last `window` keys and values unquantized."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SchemeError(f"bits must be 2 to 8, or 16 for untouched: found {self.bits}.")
        if self.granularity not in get_args(Granularity):
            raise SchemeError(
                f"granularity must be one of {', '.join(LETTER_OF)}: found {self.granularity!r}."
            )
        if (self.granularity == "group") != (self.group_size is not None):
            raise SchemeError(
                f"group_size goes with granularity group: found {self.granularity}, {self.group_size}."
            )
        if self.group_size is not None and self.group_size < 2:
            raise SchemeError(f"group_size must be at least 2: found {self.group_size}.")
        if self.map not in (None, 1, 2):
            raise SchemeError(f"a map is 1 (added) or 2 (subtracted): found {self.map!r}.")
        if self.map is not None and self.granularity == "map":
            raise SchemeError(
                f"one map alone has one scale per map already: found a scale per map (m) and m{self.map}. Write "
                f"tm{self.map}."
            )
        if self.window is not None and self.window < 1:
            raise SchemeError(f"a window must hold at least 1 key: found {self.window}. Leave it out.")

    @property
    def grain(self) -> str:
        """Granularity as letters of a name: `g64`."""
        return LETTER_OF[self.granularity] + ("" if self.group_size is None else str(self.group_size))

    @property
    def modifiers(self) -> str:
        """What follows the granularity in a name: zero point, static, map and window, as in `zsm1u128`."""
        zero, fixed = "" if self.symmetric else "z", "s" if self.static else ""
        only = "" if self.map is None else f"m{self.map}"
        return zero + fixed + only + ("" if self.window is None else f"u{self.window}")


@dataclass(frozen=True)
class WeightFormat:
    """A format of weights with an arithmetic of its own, named in `quantlab.schemes.catalogue.WEIGHT_FORMATS`."""

    name: str
    bits: int
    """Bits of a code."""
    group_size: int | None = None
    """Neighbours along the input that share a scale; None is a whole output channel."""
