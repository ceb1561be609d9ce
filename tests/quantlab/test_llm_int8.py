"""LLM.int8(): bitsandbytes' codes and products, one sequence at a time, and nothing that depends on the batch."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from quantlab.errors import SchemeError
from quantlab.kernels.llm_int8 import LlmInt8Weight, OutlierCount, linear, quantize_inputs
from quantlab.methods.llm_int8 import llm_int8
from tests.quantlab.bnb import load

U16, U32 = 2.0**-11, 2.0**-24
BNB_CONSTANT = 6.200124e-05
"""What bitsandbytes 0.50.2's CPU path multiplies by instead of 1 / 127^2 = 6.2000124e-05: 1.8e-5 too much."""

NUM_INPUTS, NUM_OUTPUTS, NUM_TOKENS = 96, 40, 7


def weights(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(NUM_OUTPUTS, NUM_INPUTS, generator=generator) * 0.1
    weight_OI[5] = 0.0
    return weight_OI, torch.randn(NUM_OUTPUTS, generator=generator)


def inputs(*columns: int, seed: int = 1, tokens: int = NUM_TOKENS) -> Tensor:
    """[1, T, K] with an outlier in each column, at one token or at all of them; one value is exactly 6."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, tokens, NUM_INPUTS, generator=generator).clamp(-5.5, 5.5)
    for place, column in enumerate(columns):
        x[0, :: 1 + place % 3, column] = (-1.0) ** place * (6.0 + 9.0 * place)
    return x


def peer(bnb: Any, weight_OI: Tensor, bias: Tensor | None, threshold: float = 6.0) -> Any:
    """bitsandbytes' linear on the CPU, its weights quantized."""
    linear8 = bnb.nn.Linear8bitLt(
        NUM_INPUTS, NUM_OUTPUTS, bias=bias is not None, has_fp16_weights=False, threshold=threshold
    )
    linear8.load_state_dict({"weight": weight_OI} | ({} if bias is None else {"bias": bias}))
    return linear8.to("cpu").eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_bitsandbytes_codes_and_scales(dtype: torch.dtype) -> None:
    functional = load().functional
    weight_OI = torch.cat([weights()[0], weights(3)[0] * 1e4, weights(4)[0] * 1e-6]).to(dtype)
    codes, scale, _ = functional.int8_vectorwise_quant(weight_OI.half())
    # In bitsandbytes an output of zeros is 0 times infinity, whose int8 is whatever the machine makes of NaN.
    codes[scale == 0] = 0
    ours = llm_int8(weight_OI, "w")
    assert torch.equal(ours.codes.view(torch.int8), codes)
    assert torch.equal(ours.scale.flatten(), scale)
    held = LlmInt8Weight(ours)
    assert torch.equal(held.codes, codes) and torch.equal(held.scale, scale)
    assert torch.equal(held.dequantize(), ours.dequantize())
    assert ours.storage_bits(16) == weight_OI.numel() * 8 + len(weight_OI) * 32


def test_error_of_weights_is_half_a_step() -> None:
    weight_OI, _ = weights()
    ours = llm_int8(weight_OI, "w")
    error = (ours.dequantize() - weight_OI).abs()
    bound = ours.scale * (1 / 254 + 4 * U32) + weight_OI.abs() * U16 + 2.0**-25
    assert (error <= bound).all(), f"worst excess {(error - bound).max():.3e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, NUM_TOKENS])
@pytest.mark.parametrize("columns", [(), (3,), (3, 17, 18, 60, 95)])
def test_input_codes_are_those_of_bitsandbytes(
    dtype: torch.dtype, tokens: int, columns: tuple[int, ...]
) -> None:
    functional = load().functional
    x = inputs(*columns, tokens=tokens).to(dtype)
    x[0, 0, 40] = 5.9999  # 6.0 in float16 and bfloat16: an outlier
    if tokens > 1:
        x[0, 3, 17] = 5.75  # largest of its token and no outlier itself, though its column may hold some
    codes, scale, outliers = functional.int8_vectorwise_quant(x[0].half(), threshold=6.0)
    ours, our_scale, our_columns = quantize_inputs(x)
    assert torch.equal(ours[0], codes) and torch.equal(our_scale[0, :, 0], scale)
    assert our_columns[0].nonzero().flatten().tolist() == outliers.tolist() == sorted({*columns, 40})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("columns", [(), (3,), (3, 17, 18, 60, 95)])
def test_agrees_with_bitsandbytes_linear(
    dtype: torch.dtype, with_bias: bool, columns: tuple[int, ...]
) -> None:
    bnb = load()
    weight_OI, bias = weights()
    bias_O = bias.to(dtype) if with_bias else None
    x = inputs(*columns).to(dtype)
    with torch.no_grad():
        theirs = peer(bnb, weight_OI, bias_O)(x.clone()).double()
    held = LlmInt8Weight(llm_int8(weight_OI, "w"))
    ours = linear(x, held, bias_O).double()

    codes, scale, found = quantize_inputs(x)
    integer = codes.double() @ held.codes.double().t() * (scale.double() / 127) * (held.scale.double() / 127)
    real = held.dequantize().double()[:, found[0]]
    outliers = x.double()[..., found[0]] @ real.t()
    magnitudes = x.double().abs()[..., found[0]] @ real.abs().t()
    bias_or_0 = torch.zeros(NUM_OUTPUTS) if bias_O is None else bias_O
    exact, integer_and_bias = integer + outliers + bias_or_0, (integer + bias_or_0).abs()
    # u of the dtype. Theirs rounds the integer part with its bias, every outlier weight, and the result to it;
    # ours the result alone. All other steps of both are float32: at most C + 5 of them on a sum of C outliers.
    u = {torch.float16: U16, torch.bfloat16: 2.0**-8, torch.float32: U32}[dtype]
    steps = U32 * ((len(columns) + 5) * magnitudes + 6 * (integer.abs() + integer_and_bias + bias_or_0.abs()))
    subnormal = 2.0**-25 * (1 + x.double().abs()[..., found[0]].sum(-1, keepdim=True))
    our_bound = u * exact.abs() + steps + subnormal
    their_bound = (
        our_bound
        + u * (integer_and_bias + magnitudes) * (1 + 2 * u)
        + (BNB_CONSTANT * 127**2 - 1) * integer.abs() * (1 + 2 * u)
    )
    assert ((ours - exact).abs() <= our_bound).all()
    excess = (ours - theirs).abs() - our_bound - their_bound
    assert (excess <= 0).all(), f"worst excess {excess.max():.3e}"
    assert ours.abs().max() > 1.0 and (held.outliers.total, held.outliers.num_sequences) == (len(columns), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_batch_gives_each_sequence_its_own_bits(dtype: torch.dtype) -> None:
    weight_OI, bias = weights()
    held, bias = LlmInt8Weight(llm_int8(weight_OI, "w")), bias.to(dtype)
    alone = [inputs(3, 17), inputs(40, 41, 42, seed=5), inputs(seed=6)]
    alone = [x.to(dtype) for x in alone]
    together = linear(torch.cat(alone), held, bias)
    assert torch.equal(together, torch.cat([linear(x, held, bias) for x in alone]))
    assert torch.equal(linear(alone[0][0], held, bias), together[0])


def test_bitsandbytes_itself_mixes_the_sequences_of_a_batch() -> None:
    bnb = load()
    module = peer(bnb, *weights())
    alone = [inputs(3, 17).half(), inputs(40, seed=5).half()]
    with torch.no_grad():
        together = module(torch.cat(alone))
        apart = torch.cat([copy.deepcopy(module)(x) for x in alone])
    # An outlier of one sequence takes the column from the int8 product of the other.
    assert not torch.equal(together, apart)


def test_outliers_are_counted_by_sequence() -> None:
    held = LlmInt8Weight(llm_int8(weights()[0], "w"))
    assert held.outliers == OutlierCount() and held.outliers.mean == 0.0
    linear(torch.cat([inputs(3, 17, 30), inputs(40, seed=5)]), held)
    linear(inputs(seed=6), held)
    assert held.outliers == OutlierCount(num_sequences=3, total=4, most=3)
    assert held.outliers.mean == pytest.approx(4 / 3)


def test_threshold_decides_what_is_an_outlier() -> None:
    x = inputs(3, 17)  # 6.0 at column 3, -15.0 at column 17
    for threshold, expected in [(6.0, [3, 17]), (6.01, [17]), (16.0, [])]:
        assert quantize_inputs(x, threshold)[2][0].nonzero().flatten().tolist() == expected


def test_huge_inputs_are_outliers_and_stay_exact() -> None:
    held = LlmInt8Weight(llm_int8(weights()[0], "w"))
    x = torch.zeros(1, 2, NUM_INPUTS)
    x[0, 0, 7] = 1e30  # infinite in float16
    x[0, 1, 8] = 1.0
    out = linear(x, held)
    real = held.dequantize()
    # One product and one scale on each side, each rounded once.
    assert torch.allclose(out[0, 0], real[:, 7] * 1e30, rtol=4 * U32, atol=0.0)
    assert torch.allclose(out[0, 1], real[:, 8], rtol=6 * U32, atol=0.0)


def test_zeros_and_nan_pass_through() -> None:
    weight_OI, bias = weights()
    held = LlmInt8Weight(llm_int8(weight_OI, "w"))
    x = inputs(3)
    x[0, 1], x[0, 2, 9] = 0.0, float("nan")
    out = linear(x, held, bias)
    assert torch.equal(out[0, 1], bias)
    assert out[0, 2].isnan().all() and out[0, [0, 1, 3, 4, 5, 6]].isfinite().all()


def test_weights_beyond_float16_are_refused() -> None:
    weight_OI, _ = weights()
    weight_OI[2, 2] = -1e38
    with pytest.raises(SchemeError, match=r"float16, up to 65504: a\.q_proj holds 1e\+38. Use w8, or add"):
        llm_int8(weight_OI, "a.q_proj")


def test_inputs_need_tokens() -> None:
    held = LlmInt8Weight(llm_int8(weights()[0], "w"))
    with pytest.raises(SchemeError, match=r"needs inputs \[\.\., tokens, channels\]: found \[96\]"):
        linear(torch.ones(NUM_INPUTS), held)
