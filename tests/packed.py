"""Whether this machine packs 4-bit weights in an order that quantlab reads."""

import pytest

from quantlab.errors import SchemeError
from quantlab.kernels import packed_int4

__all__ = ["LAYOUT_IS_KNOWN", "needs_int4_layout"]


def _layout_is_known() -> bool:
    try:
        packed_int4.block_size()
    except SchemeError:
        return False
    return True


LAYOUT_IS_KNOWN = _layout_is_known()

needs_int4_layout = pytest.mark.skipif(
    not LAYOUT_IS_KNOWN, reason="torch's packed int4 op has neither AVX-512's nor AVX2's byte order here"
)
"""Tests of packed weights are skipped without it; `test_packed_int4` tests that they are refused there."""
