"""Kind `table`: codes that stand for values of a table, weight = tables[entry.table][code] * scale."""

import torch
from torch import Tensor

from quantlab.export.quantlab_format.plan import Plan
from quantlab.export.quantlab_format.rows import pack_rows, packed
from quantlab.export.shards import TensorType
from quantlab.export.tensors import exactly
from quantlab.methods.llm_int8 import INT8
from quantlab.methods.solved import Quantized
from quantlab.numerics.codebook import CodebookTensor
from quantlab.numerics.tables import FLOATS, FP4, NF4
from quantlab.schemes import WeightFormat

__all__ = ["TABLES", "table_plan"]

TABLES: dict[str, Tensor] = {
    "nf4": NF4,
    "fp4": FP4,
    "nf4_dq": NF4,
    "fp4_dq": FP4,
    "fp8": FLOATS["e4m3"].values(),
    "fp8e5m2": FLOATS["e5m2"].values(),
    "mxfp4": FLOATS["e2m1"].values(),
    "mxfp6": FLOATS["e2m3"].values(),
    "mxfp6e3m2": FLOATS["e3m2"].values(),
    "nvfp4": FLOATS["e2m1"].values(),
    "llm_int8": INT8,
}
"""Format of weights -> what its codes stand for."""
_SCALE_TYPES = {"mxfp4": "e8m0", "mxfp6": "e8m0", "mxfp6e3m2": "e8m0", "nvfp4": "e4m3"}
"""Format of weights -> how its scales are stored, where they are no plain floats."""
_IN_STORED_DTYPE = ("fp8", "fp8e5m2")
"""Formats whose scales are rounded to the stored dtype; those of the others are float32."""


def table_plan(shape: tuple[int, ...], form: WeightFormat, dtype: torch.dtype) -> Plan:
    """How a matrix of this shape is stored.

    Args:
        dtype: of scales that are rounded to the stored dtype.
    """
    rows, width = shape
    scales = (rows, width // (form.group_size or width))
    kind = _SCALE_TYPES.get(form.name, "float")
    stored = torch.uint8 if kind != "float" else dtype if form.name in _IN_STORED_DTYPE else torch.float32
    entry = {"kind": "table", "bits": form.bits, "scale": list(scales), "scale_type": kind}
    tensors = {"codes": packed(rows, width, form.bits), "scale": TensorType(stored, scales)}
    if kind == "e4m3":
        tensors["matrix_scale"] = TensorType(torch.float32, (1,))

    def build(quantized: Quantized) -> dict[str, Tensor]:
        assert isinstance(quantized, CodebookTensor)
        ours = TABLES[form.name].to(quantized.values.device)
        assert torch.equal(quantized.values.nan_to_num(), ours.nan_to_num()), f"codes of {form.name}"
        made = {"codes": pack_rows(quantized.codes, form.bits)}
        if kind == "float":
            return made | {"scale": exactly(quantized.scale, stored)}
        if kind == "e8m0":
            return made | {"scale": _exponents(quantized.scale)}
        of_matrix, codes = _factored(quantized.scale)
        return made | {"scale": codes, "matrix_scale": of_matrix.view(1)}

    return Plan(entry | {"table": form.name}, tensors, build)


def _exponents(scale: Tensor) -> Tensor:
    """n of 2^(n - 127), uint8."""
    exponent = torch.frexp(scale).exponent - 1 + 127
    assert torch.equal(torch.ldexp(torch.ones_like(scale), exponent - 127), scale), "scales are powers of two"
    return exponent.to(torch.uint8)


def _factored(scale: Tensor) -> tuple[Tensor, Tensor]:
    """(t, codes uint8): scale = e4m3 * t, rounded to float32, as NVFP4 makes it: the largest e4m3 is 448."""
    values = FLOATS["e4m3"].values()[:127].to(scale.device)
    near = scale.max() / values[-1]
    bits = near.view(torch.int32) + torch.arange(-3, 4, dtype=torch.int32, device=scale.device)
    # A matrix of zeros has the smallest t.
    for of_matrix in (*bits.view(torch.float32), torch.tensor(2.0**-126, device=scale.device)):
        products = values * of_matrix
        codes = torch.searchsorted(products, scale.contiguous()).clamp(max=126)
        if torch.equal(products[codes], scale):
            return of_matrix, codes.to(torch.uint8)
    raise AssertionError("scales of nvfp4 are products of an 8-bit float and one number")
