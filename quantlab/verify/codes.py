"""Codes and scales of a folder against what the quantizer chose: every linear, bit for bit. No torch.

The MANIFEST holds a digest of the codes and one of the scales (with zero points, offsets and tables) of each linear.
Zero points at 0 and at 2^b - 1 are counted: there a reader or writer that is off by one wraps around, so that equal
digests of a folder that has some prove the convention at both ends of the grid.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quantlab.reading.decoded import Decoded
from quantlab.verify.sources import Source

__all__ = ["CodesReport", "check_codes"]


@dataclass
class CodesReport:
    """What was found in the linears of a folder."""

    num_linears: int = 0
    num_weights: int = 0
    num_zeros: int = 0
    """Stored zero points."""
    zeros_at_0: int = 0
    zeros_at_max: int = 0
    stored_as: dict[str, list[str]] = field(default_factory=dict)
    """Type -> linears, where a format has several: which matrices took GGUF's fallback types."""
    wrong_codes: list[str] = field(default_factory=list)
    """Linears whose codes are not those that were chosen."""
    wrong_scales: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Linears of the manifest that the folder lacks."""
    unknown: list[str] = field(default_factory=list)
    """Linears of the folder that the manifest does not know."""
    not_finite: list[str] = field(default_factory=list)
    """Linears that have a scale, zero point or offset that is no number."""
    beyond_grid: list[str] = field(default_factory=list)
    """Linears that have a code or zero point outside 0 .. 2^b - 1, or a zero point that is not whole."""

    def failures(self) -> list[str]:
        """What is wrong, each in a sentence that names the first linear."""
        kinds = {
            "linears of the manifest must be in the folder": self.missing,
            "linears of the folder must be in its manifest": self.unknown,
            "scales must be finite": self.not_finite,
            "codes and zero points must lie on the grid": self.beyond_grid,
            "codes must be those that the quantizer chose": self.wrong_codes,
            "scales must be those that the quantizer chose": self.wrong_scales,
        }
        return [
            f"{rule}: {names[0]}{_more(names)} {'does' if len(names) == 1 else 'do'} not comply"
            for rule, names in kinds.items()
            if names
        ]


def check_codes(
    source: Source, chosen: Mapping[str, Any], advance: Callable[[int], object], *, whole_zeros: bool = True
) -> CodesReport:
    """Decode every linear and compare.

    Args:
        chosen: `tensors` of the manifest: name -> {"codes": sha256, "scales": sha256}.
        advance: told how many linears were read, as they are.
        whole_zeros: whether zero points are codes themselves; HQQ's are real numbers.

    Raises:
        CheckpointError: tensors are not as their format has them.
    """
    report = CodesReport()
    names = source.linears()
    report.missing = sorted(chosen.keys() - set(names))
    report.unknown = sorted(set(names) - chosen.keys())
    for name in names:
        decoded = source.decode(name)
        report.num_linears += 1
        report.num_weights += decoded.codes_OI.size
        if kind := source.stored_as(name):
            report.stored_as.setdefault(kind, []).append(name)
        _check_values(report, name, decoded, whole_zeros)
        found = decoded.digests()
        expected = chosen.get(name, found)
        if found["codes"] != expected.get("codes"):
            report.wrong_codes.append(name)
        if found["scales"] != expected.get("scales"):
            report.wrong_scales.append(name)
        advance(1)
    return report


def _check_values(report: CodesReport, name: str, decoded: Decoded, whole_zeros: bool) -> None:
    parts = (decoded.scale_OG, decoded.zero_OG, decoded.offset_OG)
    if not all(np.isfinite(part).all() for part in parts if part is not None):
        report.not_finite.append(name)
    highest = 2**decoded.bits - 1
    beyond = decoded.codes_OI.size > 0 and int(decoded.codes_OI.max()) > highest
    zero = decoded.zero_OG
    if zero is not None:
        report.num_zeros += zero.size
        report.zeros_at_0 += int((zero == 0).sum())
        report.zeros_at_max += int((zero == highest).sum())
        beyond |= whole_zeros and bool(((zero < 0) | (zero > highest) | (zero != np.round(zero))).any())
    if beyond:
        report.beyond_grid.append(name)


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
