"""ggml's blocks, as this format stores them."""

from collections.abc import Mapping

__all__ = ["BLOCKS", "SUB_SCALES", "WITH_MINIMA", "WITH_SUB_MINIMA"]

BLOCKS: Mapping[str, tuple[int, int, int]] = {
    "Q8_0": (8, 32, 1),
    "Q5_1": (5, 32, 1),
    "Q5_0": (5, 32, 1),
    "Q4_1": (4, 32, 1),
    "Q4_0": (4, 32, 1),
    "Q6_K": (6, 256, 16),
    "Q5_K": (5, 256, 8),
    "Q4_K": (4, 256, 8),
    "Q3_K": (3, 256, 16),
}
"""ggml's type -> bits of a code, weights of a block, scales of a block."""
WITH_MINIMA = ("Q4_1", "Q5_1", "Q4_K", "Q5_K")
"""Types that store a minimum, or the scale of minima."""
WITH_SUB_MINIMA = ("Q4_K", "Q5_K")
"""Types that store a minimum of each group, in units of that scale."""
SUB_SCALES: Mapping[str, tuple[int, int]] = {
    "Q6_K": (8, 128),
    "Q5_K": (6, 0),
    "Q4_K": (6, 0),
    "Q3_K": (6, 32),
}
"""K type -> bits of a sub-scale as it is packed, and what was added to it."""
