"""Packed kernels: the codes that were given, errors of the size of a bf16 linear's, and no silent other path."""

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from quantlab.config import QuantizeConfig
from quantlab.errors import SchemeError
from quantlab.kernels import packed_int4, packed_int8
from quantlab.kernels.choice import KERNELS, check_packed, choose_kernel
from quantlab.layers.linear import QuantLinear
from quantlab.methods.rtn import quantize_weight
from quantlab.numerics.affine import QuantizedTensor
from quantlab.numerics.qtype import QType
from quantlab.quantize import quantized
from quantlab.schemes import Scheme, TensorSpec
from tests.packed import LAYOUT_IS_KNOWN, needs_int4_layout
from tests.toys import toy_model

U = 2.0**-8
"""Relative rounding of bfloat16."""

INT4 = [
    "w4",
    "w4t",
    "w4z",
    "w4g32",
    "w4g64",
    "w4g128",
    "w4g256",
    "w4g32z",
    "w4g64z",
    "w4g128z",
    "w4g256z",
    "w3g64",
    "w2g32z",
]
PACKED_INT4 = [pytest.param(name, marks=needs_int4_layout) for name in INT4]
INT8 = ["w8", "w6", "w5", "w8t"]
ROWS = [
    1,
    3,
    4,
    packed_int4.FEWEST_FOR_GEMM - 1,
    packed_int4.FEWEST_FOR_GEMM,
    packed_int4.FEWEST_FOR_GEMM + 7,
]


def weights_of(name: str) -> TensorSpec:
    spec = Scheme.parse(name).weights
    assert isinstance(spec, TensorSpec)
    return spec


def quantized_matrix(
    name: str, num_outputs: int = 144, seed: int = 0, **options: torch.dtype
) -> QuantizedTensor:
    """[num_outputs, 512]; 144 are two whole blocks of 64 and a short one."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(num_outputs, 512, generator=generator) + 0.2
    return quantize_weight(real, weights_of(name), **options)


def inputs(num_rows: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_rows, 512, generator=generator) + 0.3).to(torch.bfloat16)


@pytest.mark.parametrize("name", PACKED_INT4)
@pytest.mark.parametrize("num_outputs", [16, 64, 112, 144, 320])
def test_packed_codes_are_those_that_were_given(name: str, num_outputs: int) -> None:
    weight = quantized_matrix(name, num_outputs)
    packed = packed_int4.Int4Weight(weight)
    middle = 0 if weight.zero_point is None else 1 << weight.qtype.bits - 1
    assert torch.equal(packed_int4.unpack(packed.packed).int(), weight.codes.int() - middle + 8)
    assert packed.packed.numel() * 2 == weight.codes.numel()


@pytest.mark.parametrize("name", PACKED_INT4)
def test_a_weight_differs_from_the_grid_by_what_bf16_scales_cost(name: str) -> None:
    weight = quantized_matrix(name)
    groups = weight.codes.unflatten(1, (weight.scale.shape[1], -1)).double()
    middle = 0 if weight.zero_point is None else 1 << weight.qtype.bits - 1
    zero = 0 if weight.zero_point is None else weight.zero_point.unsqueeze(-1).double()
    # One rounding of the scale and one of the zero; float32 adds a few 2^-24 of the same magnitudes.
    steps = (groups - middle).abs() + abs(middle - zero)
    bound = (U + 2**-22) * (steps * weight.scale.unsqueeze(-1)).flatten(1)
    error = (packed_int4.Int4Weight(weight).dequantize().double() - weight.dequantize()).abs()
    assert (error <= bound).all(), f"worst excess {(error - bound).max():.3e}"
    assert bound.max() <= (16 * U + 2**-18) * weight.scale.max()


@needs_int4_layout
def test_symmetric_weights_with_scales_as_exports_store_them_are_exact() -> None:
    for name in ("w4", "w4g32", "w3g64"):
        weight = quantized_matrix(name, scale_dtype=torch.bfloat16)
        assert torch.equal(packed_int4.Int4Weight(weight).dequantize(), weight.dequantize())
    weight = quantized_matrix("w8", scale_dtype=torch.bfloat16)
    assert torch.equal(packed_int8.PackedInt8Weight(weight).dequantize(), weight.dequantize())


def errors(x: Tensor, weight_NK: Tensor, out: Tensor, bias: Tensor | None) -> tuple[float, float]:
    """Root mean squares of the error of `out` and of plain torch in bfloat16, against float64."""
    exact = functional.linear(x.double(), weight_NK.double(), None if bias is None else bias.double())
    plain = functional.linear(x, weight_NK.to(torch.bfloat16), bias)
    return (out - exact).square().mean().sqrt().item(), (plain - exact).square().mean().sqrt().item()


@pytest.mark.parametrize("name", PACKED_INT4 + INT8)
@pytest.mark.parametrize("num_rows", ROWS)
def test_the_error_is_at_most_twice_that_of_a_bf16_linear(name: str, num_rows: int) -> None:
    weight, x = quantized_matrix(name), inputs(num_rows)
    bias = torch.randn(144, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    for added in (None, bias):
        if name in INT4:
            out = packed_int4.linear(x, packed_int4.Int4Weight(weight), added)
        else:
            out = packed_int8.linear(x, packed_int8.PackedInt8Weight(weight), added)
        ours, plain = errors(x, weight.dequantize(), out, added)
        assert out.dtype == torch.bfloat16 and ours <= 2 * plain, f"{ours:.3e} against {plain:.3e}"


@needs_int4_layout
@pytest.mark.parametrize("name", ["w4g64", "w4g32z"])
def test_both_paths_compute_the_same_weights(name: str) -> None:
    """Column by column: one-hot inputs read single weights, which are rounded once on either path."""
    weight = packed_int4.Int4Weight(quantized_matrix(name))
    one_hot = torch.eye(512).to(torch.bfloat16)
    expected = weight.dequantize().to(torch.bfloat16)
    assert torch.equal(packed_int4.unpacked_linear(one_hot, weight).t(), expected)
    for start in range(0, 512, 32):
        rows = slice(start, start + 32)
        assert torch.equal(packed_int4.linear(one_hot[rows], weight).t(), expected[:, rows])


@needs_int4_layout
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_and_zero_points_at_both_ends(bits: int, symmetric: bool) -> None:
    """Powers of two as scales make every product exact, so the real matrix comes back to the last bit."""
    qtype = QType(bits, symmetric, full_range=symmetric)
    codes = torch.tensor([qtype.qmin, qtype.qmax], dtype=qtype.dtype).repeat(32, 32)
    for zero in (None,) if symmetric else (qtype.qmin, qtype.qmax):
        point = None if zero is None else torch.full((32, 2), zero, dtype=torch.int32)
        weight = QuantizedTensor(codes, torch.full((32, 2), 0.25), point, qtype)
        packed = packed_int4.Int4Weight(weight)
        assert torch.equal(packed.dequantize(), weight.dequantize())
        one_hot = torch.eye(64).to(torch.bfloat16)
        expected = weight.dequantize().to(torch.bfloat16)
        assert torch.equal(packed_int4.linear(one_hot, packed).t(), expected)
        assert torch.equal(packed_int4.linear(one_hot[:8], packed).t(), expected[:, :8])


@needs_int4_layout
def test_float32_inputs_never_reach_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for name in ("_weight_int4pack_mm_for_cpu", "_weight_int8pack_mm"):
        op = getattr(torch.ops.aten, name)

        def watched(x: Tensor, *rest: object, op: object = op) -> Tensor:
            seen.append(x.dtype)
            return op(x, *rest)  # type: ignore[operator, no-any-return]

        monkeypatch.setattr(torch.ops.aten, name, watched)
    x, bias = inputs(3).float(), torch.ones(144)
    int4, int8 = (
        packed_int4.Int4Weight(quantized_matrix("w4g64")),
        packed_int8.PackedInt8Weight(quantized_matrix("w8")),
    )
    for out, again in (
        (packed_int4.linear(x, int4, bias), packed_int4.linear(x.bfloat16(), int4, bias)),
        (packed_int8.linear(x, int8, bias), packed_int8.linear(x.bfloat16(), int8, bias)),
    ):
        assert out.dtype == torch.float32 and torch.equal(out, again.float())
    assert seen == [torch.bfloat16] * 4


def test_views_at_odd_addresses_are_read_whole() -> None:
    """The int8 op takes aligned addresses on trust."""
    weight = quantized_matrix("w8")
    storage = torch.empty(weight.codes.numel() + 1, dtype=torch.int8)
    moved = QuantizedTensor(
        storage[1:].view_as(weight.codes).copy_(weight.codes), weight.scale, None, weight.qtype
    )
    x = torch.empty(5 * 512 + 1, dtype=torch.bfloat16)[1:].view(5, 512).copy_(inputs(5))
    packed = packed_int8.PackedInt8Weight(moved)
    assert packed.codes.data_ptr() % 64 == 0 and x.data_ptr() % 64
    assert torch.equal(
        packed_int8.linear(x, packed), packed_int8.linear(x.clone(), packed_int8.PackedInt8Weight(weight))
    )


@pytest.mark.parametrize("name", [pytest.param("w4g64", marks=needs_int4_layout), "w8"])
def test_shapes_and_values_that_are_no_numbers(name: str) -> None:
    linear = QuantLinear(
        nn.Linear(512, 144),
        quantized_matrix(name),
        None,
        choose_kernel(weights_of(name), None, "cpu", "packed")[0],
    )
    assert linear(torch.zeros(0, 512)).shape == (0, 144) and linear(torch.zeros(2, 0, 512)).shape == (
        2,
        0,
        144,
    )
    x = inputs(100).view(2, 50, 512)
    assert linear(x).shape == (2, 50, 144) and linear(x[0, 0]).shape == (144,)
    for num_rows in (2, 50):
        x = inputs(num_rows).clone()
        x[1, 5] = torch.nan
        assert linear(x)[1].isnan().all() and linear(x)[0].isfinite().all()


def test_which_packed_kernel_runs() -> None:
    def chosen(name: str, device: str = "cpu") -> str:
        scheme = Scheme.parse(name)
        return choose_kernel(scheme.weights, scheme.activations, device, "packed")[0]

    assert "packed" in KERNELS
    assert [chosen(name) for name in INT4] == ["int4_packed"] * len(INT4)
    assert [chosen(name) for name in INT8] == ["int8_packed"] * len(INT8)
    assert [chosen(name) for name in ("w8a8", "w4g128a8z", "w16", "llm_int8")] == [
        "int8_mm",
        "int8_mm",
        "weight_only",
        "llm_int8",
    ]
    for name, why in {
        "nf4": "codes: those of nf4 are none",
        "w4g16": "int4_packed needs a scale per multiple of 32 inputs: it has one per 16",
        "w8g64": "int8_packed needs one scale per output: it has one per 64 inputs",
        "w8z": "int8_packed needs a symmetric grid: it has zero points",
        "w8a8c": "low-bit inputs in integer products only: a scale per channel",
        "a8": "low-bit inputs in integer products only: 16-bit weights have no integer product",
    }.items():
        with pytest.raises(SchemeError, match=why):
            chosen(name)
    with pytest.raises(SchemeError, match="packed kernels run on the CPU: found cuda"):
        chosen("w4g64", "cuda")


@needs_int4_layout
def test_shapes_that_the_int4_op_cannot_take_are_refused() -> None:
    with pytest.raises(SchemeError, match=r"needs a multiple of 16 outputs: it has 40, in a.proj. Use"):
        check_packed("int4_packed", weights_of("w4g64"), {"a.proj": (40, 512)})
    with pytest.raises(SchemeError, match=r"a scale per multiple of 32 inputs: it has one per 48, in a.proj"):
        check_packed("int4_packed", weights_of("w4"), {"a.proj": (64, 48)})


def test_shapes_that_the_ops_cannot_take_are_refused() -> None:
    with pytest.raises(SchemeError, match=r"int8_packed needs a multiple of 16 inputs: it has 40, in a.proj"):
        check_packed("int8_packed", weights_of("w8"), {"a.proj": (64, 40)})
    with pytest.raises(SchemeError, match="int4_packed needs a multiple of 16 outputs: it has 40, in b"):
        packed_int4.Int4Weight(quantized_matrix("w4g64", 40), "b")
    with pytest.raises(SchemeError, match="int8_packed needs a symmetric grid: it has zero points, in b"):
        packed_int8.PackedInt8Weight(quantized_matrix("w8z"), "b")


@pytest.fixture
def unknown_layout(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose op has another byte order: this one, or this one pretending."""
    if LAYOUT_IS_KNOWN:
        pack = packed_int4._pack
        monkeypatch.setattr(packed_int4, "_pack", lambda codes: pack(codes).flip(0))
    packed_int4.block_size.cache_clear()
    yield
    packed_int4.block_size.cache_clear()


def test_an_unknown_layout_is_refused_before_anything_is_changed(unknown_layout: None) -> None:
    """Codes could not be read back from it, and products of many tokens would be of other weights."""
    said = (
        "packed int4 weights need torch's CPU op in the byte order of AVX-512 or AVX2: this machine has another. "
        "Use kernel=integer."
    )
    model = toy_model()
    modules = list(model.modules())
    for refused in (
        lambda: packed_int4.Int4Weight(quantized_matrix("w4g64")),
        lambda: check_packed("int4_packed", weights_of("w4g64"), {"a.proj": (64, 512)}),
        lambda: quantized(model, Scheme.parse("w4g32"), QuantizeConfig(kernel="packed")).__enter__(),
    ):
        with pytest.raises(SchemeError, match=re.escape(said)):
            refused()
    assert all(now is before for now, before in zip(model.modules(), modules, strict=True))
    check_packed("int8_packed", weights_of("w8"), {"a.proj": (64, 512)})


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        pytest.param("w4g32", "int4_packed", marks=needs_int4_layout),
        ("w8", "int8_packed"),
        ("w8a8", "int8_mm"),
    ],
)
def test_a_model_runs_packed_and_says_so(name: str, kernel: str) -> None:
    model = toy_model().to(torch.bfloat16)
    tokens = torch.arange(48).view(1, -1)
    scheme = Scheme.parse(name)
    with torch.no_grad():
        with quantized(model, scheme) as changes:
            expected = model(tokens).logits
        with quantized(model, scheme, QuantizeConfig(kernel="packed")) as changes:
            rows = [row for row in changes.rows if row.action == "swapped"]
            swapped = [module for module in model.modules() if isinstance(module, QuantLinear)]
            logits = model(tokens).logits
    assert {row.kernel for row in rows} == {kernel} and len(rows) == len(swapped) == 14
    assert all(module.real_weight is None for module in swapped)
    # Two layers of bf16 linears: logits of either path are off by a few roundings of their own size.
    assert (logits - expected).abs().max() <= 16 * U * expected.abs().max()


@needs_int4_layout
def test_a_model_with_a_shape_that_cannot_pack_is_left_as_it_was() -> None:
    model = toy_model(intermediate_size=88)
    modules = list(model.modules())
    with (
        pytest.raises(
            SchemeError, match=r"it has 88, in model.layers.0.mlp.gate_proj. Use kernel=integer, or add"
        ),
        quantized(model, Scheme.parse("w4g32"), QuantizeConfig(kernel="packed", skip=("*.down_proj",))),
    ):
        pass
    assert all(now is before for now, before in zip(model.modules(), modules, strict=True))


@needs_int4_layout
def test_a_real_zero_point_far_outside_the_codes_is_refused() -> None:
    """HQQ's, where all weights of a group have one sign: bfloat16 would hold it by steps of its own size."""
    weight = quantized_matrix("w4g64z")
    for zero, fits in ((-0.9, True), (15.9, True), (-40.25, False), (200.5, False)):
        real = replace(weight, zero_point=torch.full_like(weight.scale, zero))
        if fits:
            error = (packed_int4.Int4Weight(real).dequantize() - real.dequantize()).abs()
            assert (error <= (17 * U + 2**-17) * weight.scale.max()).all()
        else:
            with pytest.raises(
                SchemeError, match=rf"codes 0 to 15, or one code beyond: here has one at {zero}"
            ):
                packed_int4.Int4Weight(real, "here")
