"""RTN under the signature that weight methods share."""

import pytest
import torch

from quantlab.methods.rtn import quantize_weight, quantize_weights
from quantlab.schemes import TensorSpec
from tests.quantlab.methods.matrices import GRIDS, heavy_tailed, name_of


def test_one_result_for_each_spec_in_order() -> None:
    weight = heavy_tailed()
    solved = quantize_weights(weight, GRIDS)
    assert len(solved) == len(GRIDS)
    for spec, one in zip(GRIDS, solved, strict=True):
        alone = quantize_weight(weight, spec)
        assert torch.equal(one.quantized.codes, alone.codes) and torch.equal(one.quantized.scale, alone.scale)
        assert one.note == ""
        assert alone.codes.shape == weight.shape
        assert alone.qtype.bits == spec.bits and (alone.zero_point is None) == spec.symmetric


@pytest.mark.parametrize("spec", GRIDS, ids=name_of)
def test_shapes_of_scales(spec: TensorSpec) -> None:
    shapes = {"tensor": (1, 1), "channel": (24, 1), "group": (24, 4)}
    assert quantize_weight(heavy_tailed(), spec).scale.shape == shapes[spec.granularity]


def test_a_range_on_a_mirrored_grid_may_be_as_wide_as_float32() -> None:
    weight = torch.tensor([[3e38, -3e38, 1e38, 0.0]])
    assert quantize_weight(weight, TensorSpec(8, "channel")).dequantize().isfinite().all()
