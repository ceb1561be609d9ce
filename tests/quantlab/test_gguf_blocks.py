"""Bytes of GGUF's block types: gguf-py reads our values from them, and our decoder everything that was stored."""

from collections.abc import Callable

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from quantlab.errors import CheckpointError
from quantlab.export.codes import as_decoded
from quantlab.export.gguf_blocks import block_bytes
from quantlab.methods.formats import FORMATS
from quantlab.numerics.block import BLOCK_TYPES, BlockTensor
from quantlab.reading.gguf_blocks import KINDS, unpack
from tests.quantlab.ggml import dequantized, llama_bytes

SIMPLE = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


def normal(scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(6, 512, generator=torch.Generator().manual_seed(seed)) * scale


def with_zeros() -> Tensor:
    weight_OI = normal(0.02, 1)
    weight_OI[1] = 0.0
    weight_OI[2, :256] = 0.0
    weight_OI[3, 32:64] = -0.0
    weight_OI[4, ::2] = 0.0
    return weight_OI


def constant() -> Tensor:
    """Rows of one value each, of both signs, and a row whose blocks differ."""
    weight_OI = torch.tensor([0.3, -0.3, 1.0, -7.5, 1e-3, 0.0]).unsqueeze(-1).repeat(1, 512)
    weight_OI[5] = torch.linspace(-1, 1, 32).repeat_interleave(16)
    return weight_OI


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "normal": normal,
    "heavy tails": lambda: normal(seed=2) ** 3,
    "constant": constant,
    "zeros": with_zeros,
    "above zero": lambda: normal(seed=3).abs() + 0.5,
    "below zero": lambda: -normal(seed=4).abs() - 0.5,
    "1e4": lambda: normal(1e4, 5),
    "tiny": lambda: normal(1e-6, 6),
    "tinier": lambda: normal(1e-9, 7),
    "nothing that float16 holds": lambda: normal(1e-30, 8),
    "all magnitudes": lambda: normal(seed=9) * 10 ** torch.linspace(-9, 4, 512),
}


def quantized(kind: str, weight_OI: Tensor) -> BlockTensor:
    tensor = FORMATS[kind.lower()](weight_OI, "w", scale_dtype=torch.float32)
    assert isinstance(tensor, BlockTensor) and tensor.kind == kind
    return tensor


def any_parts(kind: str, seed: int) -> BlockTensor:
    """Codes, scales and minima drawn from all that the type can hold."""
    of, rng = BLOCK_TYPES[kind], torch.Generator().manual_seed(seed)
    num_blocks = 512 // of.block_size

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (6, num_blocks * of.num_scales), generator=rng).short()

    codes = torch.randint(0, 2**of.bits, (6, 512), generator=rng).to(torch.uint8)
    d, dmin = (torch.randn(6, num_blocks, generator=rng).half() for _ in range(2))
    s = {"Q6_K": (-128, 127), "Q3_K": (-32, 31), "Q5_K": (0, 63), "Q4_K": (0, 63)}.get(kind)
    has_minima = kind in ("Q5_1", "Q4_1", "Q5_K", "Q4_K")
    return BlockTensor(
        kind,
        codes,
        d,
        dmin if has_minima else None,
        None if s is None else integers(*s),
        integers(0, 63) if s and has_minima else None,
    )


def check(tensor: BlockTensor) -> None:
    rows = block_bytes(tensor)
    assert rows.dtype == np.uint8 and 8 * rows.size == tensor.storage_bits(16) == tensor.storage_bits(99)
    theirs, ours = dequantized(rows, tensor.kind), tensor.dequantize()
    assert torch.equal(theirs.view(torch.int32), ours.view(torch.int32))
    found, stored = unpack(tensor.kind, rows), as_decoded(tensor)
    assert found.bits == tensor.bits
    assert np.array_equal(found.codes_OI, stored.codes_OI) and found.codes_OI.dtype == np.uint8
    # The digests hold every bit of scales and offsets, the signs of zeros too.
    assert found.digests() == stored.digests()
    assert np.array_equal(found.real().view(np.int32), ours.numpy().view(np.int32))


def test_sizes_are_those_of_gguf() -> None:
    for kind, of in BLOCK_TYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (of.block_size, of.num_bytes)
    assert set(KINDS) == set(BLOCK_TYPES)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_gguf_reads_our_values_and_the_decoder_our_codes(kind: str, weights: str) -> None:
    check(quantized(kind, WEIGHTS[weights]()))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_any_codes_and_scales_survive(kind: str) -> None:
    for seed in range(4):
        check(any_parts(kind, seed))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_any_bytes_mean_what_gguf_says(kind: str) -> None:
    of, rng = BLOCK_TYPES[kind], np.random.default_rng(0)
    blocks = rng.integers(0, 256, (48, of.num_bytes), dtype=np.uint8)
    at = {"Q6_K": [208], "Q3_K": [108], "Q5_K": [0, 2], "Q4_K": [0, 2], "Q5_1": [0, 2], "Q4_1": [0, 2]}
    for place in at.get(kind, [0]):
        blocks[:, place : place + 2] = rng.standard_normal((48, 1)).astype("<f2").view(np.uint8)
    rows = blocks.reshape(6, -1)
    assert np.array_equal(unpack(kind, rows).real(), dequantized(rows, kind).numpy())


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", SIMPLE)
def test_bytes_of_simple_types_are_those_of_gguf(kind: str, weights: str) -> None:
    weight_OI = WEIGHTS[weights]()
    theirs = gguf.quants.quantize(weight_OI.numpy(), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(block_bytes(quantized(kind, weight_OI)), theirs)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", SIMPLE)
def test_bytes_of_simple_types_are_those_of_llama_cpp(kind: str, weights: str) -> None:
    # A block of -0.0 alone gets d = +0.0 from gguf-py, which we follow, and -0.0 from llama.cpp.
    weight_OI = WEIGHTS[weights]() + 0.0
    assert np.array_equal(block_bytes(quantized(kind, weight_OI)), llama_bytes(weight_OI, kind))


def test_a_block_worked_by_hand() -> None:
    # d = -8 / -8 = 1, half 0x3c00; codes are w + 8: 0, 9 and, for 0, 8 everywhere else.
    weight_OI = torch.zeros(1, 32)
    weight_OI[0, 0], weight_OI[0, 16], weight_OI[0, 1] = -8.0, 1.0, 7.0
    assert block_bytes(quantized("Q4_0", weight_OI)).tolist() == [[0x00, 0x3C, 0x90, 0x8F, *[0x88] * 14]]


@pytest.mark.parametrize("shape", [(2, 0), (2, 17), (2, 143), (36,), (2, 2, 18)])
def test_rows_must_be_whole_blocks(shape: tuple[int, ...]) -> None:
    for kind in ("Q4_0", "Q4_K"):
        with pytest.raises(
            CheckpointError, match=rf"rows of {kind} must be whole blocks of \d+ bytes: found"
        ):
            unpack(kind, np.zeros(shape, dtype=np.uint8))


def test_rows_must_be_bytes() -> None:
    with pytest.raises(CheckpointError, match="whole blocks of 18 bytes: found float32"):
        unpack("Q4_0", np.zeros((2, 18), dtype=np.float32))  # type: ignore[arg-type]


def test_types_must_be_known() -> None:
    with pytest.raises(CheckpointError, match=r"can be decoded are Q8_0, .*Q3_K: found 'IQ2_XS'"):
        unpack("IQ2_XS", np.zeros((2, 18), dtype=np.uint8))


@pytest.mark.parametrize(
    ("kind", "at"), [("Q8_0", 0), ("Q4_1", 2), ("Q4_K", 0), ("Q5_K", 2), ("Q6_K", 208), ("Q3_K", 108)]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scales_must_be_finite(kind: str, at: int, bad: float) -> None:
    rows = block_bytes(any_parts(kind, 0))
    size = BLOCK_TYPES[kind].num_bytes
    rows[1, at : at + 2] = np.array([bad], dtype="<f2").view(np.uint8)
    found = rf"scales of {kind} must be finite: block {rows.shape[1] // size} of {rows.size // size} has one"
    with pytest.raises(CheckpointError, match=found):
        unpack(kind, rows)
