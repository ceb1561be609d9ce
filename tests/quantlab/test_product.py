"""Products of integer codes: exact on every backend, up to the stated limit, whatever the settings around them."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from quantlab.kernels import integer, llm_int8, product
from quantlab.methods.llm_int8 import llm_int8 as quantize_llm_int8
from quantlab.methods.rtn import quantize_weight
from quantlab.numerics.qtype import QType
from quantlab.schemes import Scheme

CPU = torch.device("cpu")
BACKENDS = {"native": product.native_product, "float32": product.float32_product}


@pytest.fixture
def fresh() -> Iterator[None]:
    """A process that has not chosen yet, before and after."""
    product._choose.cache_clear()
    yield
    product._choose.cache_clear()


def codes(rows: int, inputs: int, seed: int, low: int = -128) -> Tensor:
    """Random codes, every second row of the extremes alone."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(low, 128, (rows, inputs), generator=generator)
    drawn[::2] = torch.where(torch.rand(rows, inputs, generator=generator)[::2] < 0.5, 127, low)
    return drawn.to(torch.int8)


def exact(left: Tensor, right: Tensor) -> Tensor:
    """Sums in int64."""
    return left.long() @ right.long().t()


def pairs_in_16_bits(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """What oneDNN computes without VNNI: 128 added to the left, pairs summed in saturating 16 bits, 128 taken off."""
    unsigned, signed = left.long() + 128, right.long()
    terms = unsigned.unsqueeze(-1) * signed.unsqueeze(0)  # [M, K, N]
    terms = torch.nn.functional.pad(terms, (0, 0, 0, terms.shape[1] % 2))
    pairs = terms.unflatten(1, (-1, 2)).sum(2).clamp(-(2**15), 2**15 - 1)
    sums = (pairs.sum(1) - 128 * signed.sum(0)).int()
    return sums if out is None else out.copy_(sums)


@pytest.mark.parametrize("backend", [product.float32_product, product.exact_product])
@pytest.mark.parametrize("inputs", [1, 7, 1023, 1024, 1025, 2048, 3001])
def test_sums_equal_int64(backend: Callable[..., Tensor], inputs: int) -> None:
    left, right = codes(9, inputs, 0), codes(6, inputs, 1)
    assert torch.equal(backend(left, right).long(), exact(left, right))
    out = torch.full((9, 6), 7, dtype=torch.int32)
    assert backend(left, right, out=out) is out and torch.equal(out.long(), exact(left, right))


@pytest.mark.parametrize("backend", [product.float32_product, product.exact_product])
def test_no_rows_and_no_inputs(backend: Callable[..., Tensor]) -> None:
    assert backend(codes(0, 5, 0), codes(3, 5, 1)).shape == (0, 3)
    assert torch.equal(
        product.float32_product(codes(2, 0, 0), codes(3, 0, 1)), torch.zeros(2, 3, dtype=torch.int32)
    )


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("w8a8", 1032),
        ("w8a8z", 1024),
        ("w8za8z", 1024),
        ("w4za8", 8806),
        ("w4za8z", 8738),
        ("w2a2", 8_388_608),
    ],
)
def test_the_limit_follows_from_the_codes_as_they_enter(name: str, inputs: int) -> None:
    scheme = Scheme.parse(name)
    assert scheme.weights is not None and scheme.activations is not None
    left = integer.largest_code(QType.of_activations(scheme.activations))
    right = integer.largest_code(QType.of_weights(scheme.weights))
    assert product.inputs_of_a_block(left, right) == inputs
    assert inputs * left * right <= 2**24 < (inputs + 1) * left * right


def furthest(name: str) -> tuple[int, int]:
    """The code furthest from 0 of inputs and of weights as they enter a product, of all that the grids have."""
    scheme = Scheme.parse(name)
    assert scheme.weights is not None and scheme.activations is not None
    left, right = QType.of_activations(scheme.activations), QType.of_weights(scheme.weights)
    sides = [range(side.qmin, side.qmax + 1) for side in (left, right)]
    entering = [[code - 128 if side[-1] > 127 else code for code in side] for side in sides]
    return max(entering[0], key=abs), max(entering[1], key=abs)


@pytest.mark.parametrize("beyond", [0, 1])
@pytest.mark.parametrize("name", ["w8a8", "w8a8z", "w8za8z", "w4za8", "w4za8z", "w4a8"])
def test_sums_at_the_limit_and_one_beyond(name: str, beyond: int) -> None:
    """The largest codes in all places but one: with an odd sum beyond 2^24 a block that is one too long is inexact."""
    x, w = furthest(name)
    largest = abs(x), abs(w)
    inputs = product.inputs_of_a_block(*largest) + beyond
    left, right = torch.full((3, inputs), x, dtype=torch.int8), torch.full((4, inputs), w, dtype=torch.int8)
    left[1, 0], right[1, 0] = -1 if x < 0 else 1, -1 if w < 0 else 1
    left[2, ::2] = 0
    assert torch.equal(product.float32_product(left, right, largest).long(), exact(left, right))


def test_a_block_one_input_longer_is_not_exact() -> None:
    """The limit is no cautious one: a float32 sum of 1025 products of 8 bits misses an odd integer."""
    inputs = product.inputs_of_a_block(128, 128) + 1
    left, right = torch.full((1, inputs), -128.0), torch.full((1, inputs), -128.0)
    left[0, -1], right[0, -1] = -1.0, -1.0  # 2^24 + 1
    assert int((left @ right.t()).item()) != int((left.double() @ right.double().t()).item())
    assert product.float32_product(left.to(torch.int8), right.to(torch.int8)).item() == 2**24 + 1


@pytest.mark.parametrize("name", ["w8a8", "w4g128a8", "w8za8z"])
def test_backends_give_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = Scheme.parse(name)
    assert scheme.weights is not None and scheme.activations is not None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 35, 1280, generator=generator) + 0.3
    weight = integer.Int8Weight(quantize_weight(torch.randn(24, 1280, generator=generator), scheme.weights))
    outputs = []
    for backend in BACKENDS:
        monkeypatch.setattr(product, "backend_of", lambda _, backend=backend: backend)
        outputs.append(integer.linear(x, weight, None, scheme.activations))
    if product.native_is_exact(CPU):
        assert torch.equal(*outputs)


def outputs(kernel: str) -> Tensor:
    """Of a linear of 1,280 inputs, with outliers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 20, 1280, generator=generator)
    x[0, 3, ::300] = 9.0
    weight = torch.randn(24, 1280, generator=generator)
    if kernel == "llm_int8":
        return llm_int8.linear(x, llm_int8.LlmInt8Weight(quantize_llm_int8(weight, "w")))
    scheme = Scheme.parse("w8a8")
    assert scheme.weights is not None and scheme.activations is not None
    codes = integer.Int8Weight(quantize_weight(weight, scheme.weights))
    return integer.linear(x, codes, None, scheme.activations)


@pytest.mark.parametrize("kernel", ["int8_mm", "llm_int8"])
def test_autocast_changes_nothing(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "backend_of", lambda _: "float32")
    plain = outputs(kernel)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(outputs(kernel), plain)


@pytest.mark.parametrize("precision", ["bf16", "tf32", "ieee", "none"])
def test_products_are_in_full_precision_and_the_setting_comes_back(precision: str) -> None:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = precision
        with product.full_precision("cpu"):
            assert matmul.fp32_precision in ("ieee", "none")
        assert matmul.fp32_precision == precision
        with pytest.raises(ZeroDivisionError), product.full_precision("cpu"):
            _ = 1 // 0
        assert matmul.fp32_precision == precision
    finally:
        matmul.fp32_precision = before


def test_sums_that_saturate_in_pairs_are_caught(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    """As oneDNN does it on CPUs without VNNI; codes of -127 on the left become 1 there and hide the fault."""
    hiding = torch.full((32, 64), -127, dtype=torch.int8)
    right = torch.full((16, 64), -128, dtype=torch.int8)
    right[::2] = 127
    assert torch.equal(pairs_in_16_bits(hiding, right.t()).long(), exact(hiding, right))

    monkeypatch.setattr(torch, "_int_mm", pairs_in_16_bits)
    assert not product.native_is_exact(CPU)
    assert product.backend_of(CPU) == "float32"
    left, right = codes(9, 300, 0), codes(6, 300, 1)
    assert not torch.equal(product.native_product(left, right).long(), exact(left, right))
    assert torch.equal(product.exact_product(left, right).long(), exact(left, right))


@pytest.mark.parametrize("position", [0, 1, 511, 1023])
@pytest.mark.parametrize("sides", [(127, 127), (127, -128), (-128, 127), (-128, -128)])
def test_a_fault_in_any_place_and_sign_is_caught(
    position: int, sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    """A product that is off by one where both codes of one place are the named extremes."""

    def faulty(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
        sums = (left.long() @ right.long()).int()
        if position < left.shape[1]:
            here = (left[:, position] == sides[0]).unsqueeze(1) & (right[position] == sides[1]).unsqueeze(0)
            sums += here.int()
        return sums if out is None else out.copy_(sums)

    monkeypatch.setattr(torch, "_int_mm", faulty)
    assert not product.native_is_exact(CPU)


def test_the_faster_exact_backend_runs(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    monkeypatch.setattr(product, "native_is_exact", lambda device: True)
    for seconds, chosen in (((2.0, 1.0), "native"), ((1.0, 2.0), "float32")):
        times = iter(seconds)  # of floats, then of the native product
        monkeypatch.setattr(product, "_seconds", lambda call, device, times=times: next(times))
        product._choose.cache_clear()
        assert product.backend_of(CPU) == chosen
        assert product.backend_of(CPU) == chosen, "asked once a process"


def test_the_probe_times_one_thread_and_leaves_the_others(fresh: None) -> None:
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        product._seconds(lambda: seen.append(torch.get_num_threads()) or torch.zeros(1), CPU)
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_no_native_product_at_all(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    def missing(*_: Tensor, **__: Tensor) -> Tensor:
        raise NotImplementedError("no int8 product here")

    monkeypatch.setattr(torch, "_int_mm", missing)
    assert product.backend_of(CPU) == "float32"
    assert torch.equal(
        product.exact_product(codes(3, 9, 0), codes(2, 9, 1)).long(), exact(codes(3, 9, 0), codes(2, 9, 1))
    )


@pytest.mark.parametrize(("m", "k", "n"), [(1, 5, 3), (17, 8, 8), (33, 70, 41), (64, 64, 64), (40, 16, 9)])
def test_padding_for_cublas_adds_nothing(m: int, k: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def seen(left: Tensor, right: Tensor) -> Tensor:
        sizes.append((*left.shape, right.shape[1]))
        return (left.long() @ right.long()).int()

    monkeypatch.setattr(torch, "_int_mm", seen)
    left, right = codes(m, k, 0), codes(n, k, 1)
    assert torch.equal(product.padded_product(left, right).long(), exact(left, right))
    assert sizes[0][0] > 16 and all(size % 8 == 0 for size in sizes[0])


IN_ANOTHER_PROCESS = """
import torch
from tests.quantlab.test_product import codes, exact
from quantlab.kernels import product
left, right = codes(64, 1000, 0), codes(32, 1000, 1)
native = product.native_product(left, right).long()
print(torch.equal(native, exact(left, right)), product.backend_of(torch.device("cpu")),
      torch.equal(product.exact_product(left, right).long(), exact(left, right)))
"""


def test_a_cpu_without_vnni_sums_exactly() -> None:
    """oneDNN told to use AVX2 alone: where torch still takes its product, that is wrong, and is not chosen."""
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    native_right, backend, sums_right = done.stdout.split()
    assert sums_right == "True"
    assert native_right == "True" or backend == "float32"
