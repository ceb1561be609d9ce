"""Integer kernels: the same numbers as the float reference within rounding, and the same bits for any batch."""

import pytest
import torch
from torch import Tensor

from quantlab.errors import SchemeError
from quantlab.kernels import integer, reference
from quantlab.kernels.choice import check_integers, choose_kernel
from quantlab.methods.rtn import quantize_weight
from quantlab.numerics.affine import QuantizedTensor, quantize
from quantlab.numerics.dynamic import dynamic_qparams
from quantlab.numerics.qtype import QType
from quantlab.schemes import Scheme, TensorSpec

U = 2.0**-24

NAMES = [
    "w8a8",
    "w4a8",
    "w6a6",
    "w2a2",
    "w8ta8",
    "w8a8t",
    "w8a8z",
    "w8za8",
    "w8za8z",
    "w4za4z",
    "w4g128a8",
    "w3g64za8z",
]


def setup(name: str, tokens: int = 12, seed: int = 0) -> tuple[Tensor, QuantizedTensor, Tensor, TensorSpec]:
    """Inputs [4, tokens, 256] that lie off centre, quantized weights [40, 256], a bias, and the inputs' spec."""
    scheme, generator = Scheme.parse(name), torch.Generator().manual_seed(seed)
    assert scheme.weights is not None and scheme.activations is not None
    x = torch.randn(4, tokens, 256, generator=generator) + 0.5
    weight = quantize_weight(torch.randn(40, 256, generator=generator) + 0.2, scheme.weights)
    return x, weight, torch.randn(40, generator=generator), scheme.activations


@pytest.mark.parametrize("name", NAMES)
def test_integers_and_floats_agree_within_rounding(name: str) -> None:
    x, weight, bias, spec = setup(name)
    weight_OI = weight.dequantize()
    fake, real = (
        reference.linear(x, weight_OI, bias, spec),
        integer.linear(x, integer.Int8Weight(weight), bias, spec),
    )
    # The codes are the same, so both are one real sum. In floats every factor is rounded once and a sum of K
    # products costs at most (K + 2) u of the sum of magnitudes; integers round the sum, two scales and, per group,
    # one addition. The bias adds one rounding on either side.
    magnitudes = reference.fake_quantize_inputs(x, spec).abs() @ weight_OI.abs().t()
    bound = U * ((256 + 2 + 3 + weight.scale.shape[1]) * magnitudes + 2 * (magnitudes + bias.abs()))
    assert ((fake - real).abs() <= bound).all(), f"worst excess {((fake - real).abs() - bound).max():.3e}"


@pytest.mark.parametrize("name", [name for name in NAMES if "g" not in name])
def test_sums_are_the_exact_integers(name: str) -> None:
    """Against int64 arithmetic on codes less zero points, scaled in the same order: equal to the last bit."""
    x, weight, bias, spec = setup(name)
    scale, zero_point = dynamic_qparams(x, spec)
    inputs = quantize(x, scale, zero_point, QType.of_activations(spec)).long()
    inputs = inputs if zero_point is None else inputs - zero_point
    codes = weight.codes.long() if weight.zero_point is None else weight.codes.long() - weight.zero_point
    sums = (inputs @ codes.t()).float()
    expected = sums * weight.scale.expand(40, 1).t() * scale + bias
    assert torch.equal(integer.linear(x, integer.Int8Weight(weight), bias, spec), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_gets_the_same_bits_in_any_batch(name: str) -> None:
    x, weight, bias, spec = setup(name, tokens=37)
    codes = integer.Int8Weight(weight)
    together = integer.linear(x, codes, bias, spec)
    for i in range(4):
        assert torch.equal(integer.linear(x[i : i + 1], codes, bias, spec)[0], together[i])
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    assert torch.equal(integer.linear(x[:, order], codes, bias, spec), together[:, order])


@pytest.mark.parametrize("name", ["w8a8", "w4a8t", "w8za8z"])
def test_a_token_gets_the_same_bits_in_any_row(name: str) -> None:
    """One token or two hundred in a product: rows go through tiles, padding and vector tails."""
    x, weight, _, spec = setup(name, tokens=50)
    codes = integer.Int8Weight(weight)
    together = integer.linear(x[:1], codes, None, spec)
    if spec.granularity == "row":
        for t in (0, 16, 17, 49):
            assert torch.equal(integer.linear(x[:1, t : t + 1], codes, None, spec)[0, 0], together[0, t])
    doubled = integer.linear(x[:1].repeat(3, 1, 1), codes, None, spec)
    assert torch.equal(doubled[2], together[0])


def test_grouped_rows_do_not_depend_on_their_tile() -> None:
    x, weight, _, spec = setup("w4g128za8z", tokens=150)
    codes = integer.Int8Weight(weight)
    together = integer.linear(x, codes, None, spec)
    for t in (0, 63, 64, 149):
        assert torch.equal(integer.linear(x[:, t : t + 1], codes, None, spec)[:, 0], together[:, t])


@pytest.mark.parametrize("name", ["w8a8", "w8za8", "w8a8z", "w8za8z"])
def test_sums_fit_up_to_the_stated_number_of_inputs(name: str) -> None:
    """The largest codes at the largest K: int32 does not overflow there, and could one input later."""
    scheme = Scheme.parse(name)
    assert scheme.weights is not None and scheme.activations is not None
    weights, inputs = QType.of_weights(scheme.weights), QType.of_activations(scheme.activations)
    most = integer.max_in_features(weights, inputs)
    w = -weights.qmin if weights.symmetric else weights.qmax
    assert most * w * inputs.qmax < 2**31 <= (most + 1) * w * inputs.qmax
    codes = torch.full((8, most), -w if weights.symmetric else w, dtype=weights.dtype)
    zero = None if weights.symmetric else torch.zeros(8, 1, dtype=torch.int32)
    matrix = integer.Int8Weight(QuantizedTensor(codes, torch.ones(8, 1), zero, weights))
    x = torch.full((1, 1, most), float(inputs.qmax))
    expected = float(most * w * inputs.qmax) * (-1 if weights.symmetric else 1)
    assert torch.equal(integer.linear(x, matrix, None, scheme.activations), torch.full((1, 1, 8), expected))


def _specs(name: str) -> tuple[TensorSpec, TensorSpec]:
    scheme = Scheme.parse(name)
    return scheme.weights, scheme.activations  # type: ignore[return-value]


def test_which_kernel_runs() -> None:
    def chosen(name: str, device: str = "cpu", kernel: str = "integer") -> str:
        return choose_kernel(*_specs(name), device, kernel)[0]

    assert chosen("w4g64") == "weight_only"
    assert [chosen(name) for name in ("w8a8", "w4za4z", "w8a8t", "w4g128a8")] == ["int8_mm"] * 4
    assert [chosen(name) for name in ("a8", "w8a8c", "w8a8g32", "w4g64a8")] == ["simulated"] * 4
    assert chosen("w8a8", "cuda") == "int8_mm" and chosen("w4g128a8", "cuda") == "simulated"
    assert chosen("w8a8", kernel="simulated") == "simulated"
    assert [chosen(name) for name in ("nf4", "nf4-a8", "llm_int8")] == [
        "weight_only",
        "simulated",
        "llm_int8",
    ]
    assert (
        choose_kernel(*_specs("w8a8c"), "cpu")[1]
        == "a scale per channel of inputs cannot leave an integer sum"
    )


def test_sizes_that_int32_cannot_hold_are_refused() -> None:
    with pytest.raises(
        SchemeError, match=r"fit int32 up to 132104 inputs: a.proj has 200000. Use kernel=simulated"
    ):
        check_integers(*_specs("w8a8"), {"a.proj": (8, 200_000)})
    check_integers(*_specs("w8g128a8"), {"a.proj": (8, 200_000)})


@pytest.mark.parametrize("name", ["w8a8", "w4za8z", "w3g64za8z", "w8ta8"])
def test_the_real_matrix_comes_back(name: str) -> None:
    _, weight, _, _ = setup(name)
    assert torch.equal(integer.Int8Weight(weight).dequantize(), weight.dequantize())


@pytest.mark.parametrize("name", ["w8a8", "w8za8z", "w8a8t", "w4g128a8", "w8a8g32"])
def test_no_rows_in_no_rows_out(name: str) -> None:
    """An expert that no token is sent to gets inputs without rows."""
    x, weight, bias, spec = setup(name)
    shapes = [(0, 5, 256)] if name == "w8a8t" else [(0, 256), (0, 5, 256), (2, 0, 256)]
    for shape in shapes:
        out = reference.linear(x.new_empty(shape), weight.dequantize(), bias, spec)
        assert out.shape == (*shape[:-1], 40)
        if spec.group_size is None:
            out = integer.linear(x.new_empty(shape), integer.Int8Weight(weight), bias, spec)
            assert out.shape == (*shape[:-1], 40) and out.dtype == x.dtype


@pytest.mark.parametrize("name", ["w8a8", "w4g128a8z"])
def test_what_is_not_finite_is_never_hidden(name: str) -> None:
    x, weight, _, spec = setup(name)
    x[0, 0, 0], x[1, 1, 1] = torch.nan, torch.inf
    out = integer.linear(x, integer.Int8Weight(weight), None, spec)
    assert not out[0, 0].isfinite().any() and not out[1, 1].isfinite().any()
    assert out[2:].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w8za8z", "w8a8t"])
def test_a_gpu_gives_the_same_bits(name: str) -> None:
    x, weight, bias, spec = setup(name)
    on_cpu = integer.linear(x, integer.Int8Weight(weight), bias, spec)
    on_gpu = integer.linear(x.cuda(), integer.Int8Weight(weight).cuda(), bias.cuda(), spec)
    assert torch.equal(on_gpu.cpu(), on_cpu)
