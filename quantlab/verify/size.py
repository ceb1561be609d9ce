"""Size on disk against the bits that the recipe promises. No torch.

The recipe holds `average_storage_bits` = 8 B / N as a float64, for B bytes of N weights in low bits. N times it over 8
is B up to 2^-52 of it in two roundings, so rounded to a whole number it is B itself for every B below 2^50: the
tolerance is zero bytes. What the files hold besides is told apart: kept tensors, and headers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.verify.sources import Source

__all__ = ["SizeReport", "check_size"]


@dataclass(frozen=True)
class SizeReport:
    """Bytes of a folder's weight files."""

    expected_bytes: int
    """Of the weights in low bits, by the recipe."""
    low_bit_bytes: int
    """Of the tensors that stand for them."""
    files_bytes: int
    """Of all weight files: with kept tensors and headers."""
    bits_per_weight: float
    """Of the weights in low bits, as found on disk."""

    def failures(self) -> list[str]:
        """A sentence where the two differ."""
        if self.expected_bytes == self.low_bit_bytes:
            return []
        return [
            f"weights in low bits must take {self.expected_bytes:,} bytes, by recipe.json: they take "
            f"{self.low_bit_bytes:,}"
        ]


def check_size(folder: Path, source: Source, num_weights: int, recipe: Any) -> SizeReport:
    """Bytes of the low-bit linears on disk, and what the recipe says they are."""
    found = source.num_bytes()
    files = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
    return SizeReport(
        expected_bytes=round(float(recipe["average_storage_bits"]) * num_weights / 8),
        low_bit_bytes=found,
        files_bytes=files,
        bits_per_weight=8 * found / max(num_weights, 1),
    )
