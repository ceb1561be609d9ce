"""The gptq layouts read with numpy: v1 and v2 zero points, and the planar words of 5, 6 and 7 bits. No torch.

What is read is specified in the docstring of `quantlab.export.gptq`. O outputs, I inputs, G groups, b bits.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantlab.errors import CheckpointError
from quantlab.reading.decoded import Decoded
from quantlab.reading.raw import RawFolder

__all__ = ["decode", "linears"]

Words = NDArray[np.uint32]
Codes = NDArray[np.uint8]

_SPLITS = {2: [2], 3: [3], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}
"""How the bits of a code are split over the parts of its block, the lowest bits first."""
_LESS_ONE = {"gptq": 1, "gptq_v2": 0, "gptq_p": 0}
"""What a stored zero point lacks."""


def linears(raw: RawFolder) -> list[str]:
    """Names of the linears in low bits."""
    return raw.modules("qweight")


def decode(raw: RawFolder, name: str) -> Decoded:
    """Codes, scales and zero points of one linear.

    Raises:
        CheckpointError: config or tensors are not of this layout, or a zero point is beyond the grid.
    """
    bits, group_size, stored = _settings(raw)
    words_count, num_outputs = _shape(raw, f"{name}.qweight")
    num_inputs = words_count * 32 // bits
    size = num_inputs if group_size == -1 else group_size
    _check(
        raw, name, words_count * 32 == num_inputs * bits, f"{words_count} words do not hold {bits}-bit codes"
    )
    _check(raw, name, num_inputs % 32 == 0 and num_outputs % 32 == 0, "features are no multiples of 32")
    _check(raw, name, num_inputs % size == 0, f"groups of {size} do not divide {num_inputs} inputs")
    groups = num_inputs // size
    codes = _words(raw, f"{name}.qweight", (words_count, num_outputs))
    zeros = _words(raw, f"{name}.qzeros", (groups, num_outputs * bits // 32))
    scales = raw.array(f"{name}.scales", "F16", (groups, num_outputs)).astype(np.float32)
    _check_order(raw, name, num_inputs, size)
    zero_GO = _unpack(zeros, bits).astype(np.float32) + _LESS_ONE[stored]
    _check(
        raw, name, bool((zero_GO < 2**bits).all()), f"a v1 zero point stands for {2**bits}, beyond the grid"
    )
    symmetric = raw.quantization.get("sym") is True
    if symmetric:
        _check(raw, name, bool((zero_GO == 2 ** (bits - 1)).all()), "a symmetric grid has another zero point")
    return Decoded(
        _unpack(np.ascontiguousarray(codes.T), bits),
        bits,
        np.ascontiguousarray(scales.T),
        None if symmetric else np.ascontiguousarray(zero_GO.T),
    )


def _settings(raw: RawFolder) -> tuple[int, int, str]:
    """Bits, group_size and checkpoint_format of config.json."""
    config = raw.quantization
    bits, group_size = config.get("bits"), config.get("group_size")
    stored = config.get("checkpoint_format", config.get("format", "gptq"))
    if type(bits) is not int or bits not in _SPLITS:
        raise CheckpointError(
            f"bits must be 2 to 8 in the gptq format: config.json of {raw.path} has {bits!r}."
        )
    if type(group_size) is not int or not (group_size == -1 or 0 < group_size < 2**31):
        raise CheckpointError(
            f"group_size must be -1 or positive in the gptq format: config.json of {raw.path} has {group_size!r}."
        )
    if (
        not isinstance(stored, str)
        or stored not in _LESS_ONE
        or (len(_SPLITS[bits]) > 1) != (stored == "gptq_p")
    ):
        raise CheckpointError(
            f"checkpoint_format must be gptq, gptq_v2, or gptq_p with 5, 6 or 7 bits: config.json of {raw.path} has "
            f"{stored!r} with {bits} bits."
        )
    return bits, group_size, stored


def _shape(raw: RawFolder, name: str) -> tuple[int, int]:
    shape = raw.array(name, "I32").shape
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"a packed matrix has two dimensions: {name!r} of {raw.path} is {list(shape)}.")
    return shape[0], shape[1]


def _words(raw: RawFolder, name: str, shape: tuple[int, int]) -> Words:
    return raw.array(name, "I32", shape).view(np.uint32)


def _check(raw: RawFolder, name: str, holds: bool, what: str) -> None:
    if not holds:
        raise CheckpointError(
            f"linears must be as the gptq format has them: in {name!r} of {raw.path} {what}."
        )


def _check_order(raw: RawFolder, name: str, num_inputs: int, size: int) -> None:
    """g_idx, where there is one, must say that groups are neighbours."""
    key = f"{name}.g_idx"
    if key in raw.tensors:
        order = raw.array(key, "I32", (num_inputs,))
        whole = bool((order == np.arange(num_inputs) // size).all())
        _check(raw, name, whole, "g_idx scatters groups over the inputs, which is not read here")


def _unpack(words: Words, bits: int) -> Codes:
    """Words [N, k * bits] as codes [N, 32 k]."""
    blocks = words.reshape(len(words), -1, bits)
    codes = np.zeros((*blocks.shape[:2], 32), dtype=np.uint8)
    first = 0
    for width in _SPLITS[bits]:
        codes |= _stream(blocks[..., first : first + width], width) << np.uint8(first)
        first += width
    return codes.reshape(len(words), -1)


def _stream(words: NDArray[Any], width: int) -> Codes:
    """Words [N, k, width], each `width` one stream of bits, as 32 codes [N, k, 32]."""
    codes = np.empty((*words.shape[:2], 32), dtype=np.uint8)
    for number in range(32):
        word, bit = divmod(number * width, 32)
        found = words[..., word] >> np.uint32(bit)
        if bit + width > 32:
            found = found | (words[..., word + 1] << np.uint32(32 - bit))
        codes[..., number] = found & np.uint32(2**width - 1)
    return codes
