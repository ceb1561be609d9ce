"""Value tables: what each code of a 4-, 6- or 8-bit format stands for, in the order of the codes.

nf4    quantiles of a normal distribution   Dettmers et al. 2023, arXiv:2305.14314, appendix E
fp4    bitsandbytes' own float              bitsandbytes, `get_4bit_type`: 1 sign, 2 exponent, 1 mantissa bit over 12
dynamic8  scales of scales                  Dettmers et al. 2022, arXiv:2110.02861, section 2: dynamic tree, signed
e2m1, e2m3, e3m2, e4m3, e5m2                OCP Microscaling Formats (MX) v1.0, section 5.3, and OCP FP8 v1.0
e8m0   scale of a block, a power of two     OCP Microscaling Formats (MX) v1.0, section 5.4.1
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DYNAMIC8", "E8M0", "FLOATS", "FP4", "NF4", "FloatFormat"]

NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
"""[16] float32, ascending."""

_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = torch.tensor([*_FP4_MAGNITUDES, *(0.0 - value for value in _FP4_MAGNITUDES)]) / 12.0
"""[16] float32; the codes do not ascend with the values, and both 0 and 8 mean +0."""


def _dynamic8() -> Tensor:
    """Seven decades of each sign, with 1 to 64 values that split them evenly; 0; and 1."""
    decades = [torch.linspace(0.1, 1, 2**step + 1) for step in range(7)]
    positive = torch.cat([10.0 ** (step - 6) * (d[:-1] + d[1:]) / 2 for step, d in enumerate(decades)])
    return torch.cat([-positive, torch.tensor([0.0, 1.0]), positive]).sort().values


DYNAMIC8 = _dynamic8()
"""[256] float32, ascending; the smallest is -0.993."""

E8M0 = torch.tensor([*(2.0 ** (code - 127) for code in range(255)), float("nan")])
"""[256] float32: code 127 is 1.0, code 255 is NaN."""


@dataclass(frozen=True)
class FloatFormat:
    """A float of at most 8 bits: a sign, then exponent, then mantissa."""

    exponent_bits: int
    mantissa_bits: int
    bias: int
    largest: float
    """The largest finite magnitude; codes above it are infinite or NaN."""
    infinity: bool = False
    """Whether the code after the largest is infinite, as in IEEE 754, and not NaN."""

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest magnitude: 2^max_exponent <= largest < 2^(max_exponent + 1)."""
        return Tensor.frexp(torch.tensor(self.largest)).exponent.item() - 1  # type: ignore[return-value]

    def magnitudes(self) -> Tensor:
        """The finite values at or above zero, float32, ascending: place i holds the value of code i."""
        values = self.values()[: 2 ** (self.bits - 1)]
        return values[values.isfinite()]

    def values(self) -> Tensor:
        """[2^bits] float32: what every code stands for, infinities and NaN included."""
        positive = [self._value(code) for code in range(2 ** (self.bits - 1))]
        return torch.tensor([*positive, *(-value for value in positive)])

    def _value(self, code: int) -> float:
        """Value of a code without its sign."""
        exponent, mantissa = divmod(code, 2**self.mantissa_bits)
        fraction = mantissa / 2**self.mantissa_bits
        # Exponent 0 is subnormal: no implied one, and the spacing of exponent 1.
        value = float(((exponent > 0) + fraction) * 2.0 ** (max(exponent, 1) - self.bias))
        if value <= self.largest:
            return value
        return float("inf") if self.infinity and mantissa == 0 else float("nan")


FLOATS = {
    "e2m1": FloatFormat(2, 1, bias=1, largest=6.0),
    "e2m3": FloatFormat(2, 3, bias=1, largest=7.5),
    "e3m2": FloatFormat(3, 2, bias=3, largest=28.0),
    "e4m3": FloatFormat(4, 3, bias=7, largest=448.0),
    "e5m2": FloatFormat(5, 2, bias=15, largest=57344.0, infinity=True),
}
"""Element formats by the name of the standard."""
