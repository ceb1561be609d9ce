"""bitsandbytes, decoded: nf4 and fp4, with scales in float32 or in 8 bits, and int8. No torch.

    4 bits    weight uint8 [O * I / 2, 1]: codes in row order, two a byte, the first in the high half.
              weight.quant_map float32 [16]: what a code stands for.
              weight.absmax: one scale per `blocksize` codes in row order, float32; or uint8 codes d_k of scales, with
              scale k = nested_quant_map[d_k] * nested_absmax[k // nested_blocksize] + nested_offset in float32.
              weight.quant_state.bitsandbytes__nf4 (__fp4): uint8, JSON that holds shape [O, I], blocksize, nested_*.
    8 bits    weight int8 [O, I], SCB float32 [O]: weight = code * SCB / 127.

A code of 8 bits comes as the byte that holds it, beside a table in which it is read as int8, over 127.
Sources: bitsandbytes 0.50.2, `functional.QuantState` and `nn.Linear8bitLt`. O outputs, I inputs, G scales in a row.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantlab.errors import CheckpointError
from quantlab.reading.decoded import Decoded
from quantlab.reading.raw import RawFolder

__all__ = ["decode", "linears"]

_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
_LONGEST = 4096
"""Bytes of JSON that a linear's state may take."""
_LARGEST = 1e30
"""Of the mean of a matrix's scales."""


def linears(raw: RawFolder) -> list[str]:
    """Names of the linears in low bits: those that have a state, or scales of int8."""
    return sorted(name for leaf in (*_STATES, "SCB") for name in raw.modules(leaf))


def decode(raw: RawFolder, name: str) -> Decoded:
    """Codes and scales of one linear.

    Raises:
        CheckpointError: a shape, dtype or state that is not the format's.
    """
    if f"{name}.SCB" in raw.tensors:
        return _decode8(raw, name)
    state = _state(raw, name)
    (rows, width), size = _shape(raw, name, state), _whole(raw, name, state, "blocksize")
    packed = raw.array(f"{name}.weight", "U8")
    # The size of the file bounds what is made of it.
    if rows * width != 2 * packed.size or width % size:
        raise CheckpointError(
            f"codes must fill their matrix, and blocks its rows: {name!r} of {raw.path} has {2 * packed.size} codes in "
            f"blocks of {size} for [{rows}, {width}]."
        )
    flat = packed.reshape(-1)
    codes = np.stack([flat >> 4, flat & 15], axis=1).reshape(rows, width)
    table = raw.array(f"{name}.weight.quant_map", "F32", (16,))
    scale = _scales(raw, name, state, rows * width // size)
    return Decoded(codes, 4, scale.reshape(rows, -1), table=table)


def _decode8(raw: RawFolder, name: str) -> Decoded:
    codes = raw.array(f"{name}.weight", "I8")
    if codes.ndim != 2 or not codes.size:
        raise CheckpointError(
            f"int8 weights must be a matrix: {name!r} of {raw.path} is {list(codes.shape)}."
        )
    scale = raw.array(f"{name}.SCB", "F32", (len(codes),))
    table = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32) / np.float32(127)
    return Decoded(codes.view(np.uint8), 8, scale[:, None], table=table)


def _scales(raw: RawFolder, name: str, state: Mapping[str, Any], count: int) -> NDArray[np.float32]:
    """[count] float32."""
    stored = raw.array(f"{name}.weight.absmax", None, (count,))
    if raw.tensors[f"{name}.weight.absmax"].dtype == "F32":
        return stored
    codes = raw.array(f"{name}.weight.absmax", "U8")
    size, offset = _whole(raw, name, state, "nested_blocksize"), state.get("nested_offset")
    number = offset if isinstance(offset, float | int) else _LARGEST
    if not -_LARGEST < number < _LARGEST:
        raise CheckpointError(
            f"nested scales must have an offset that is finite: {name!r} of {raw.path} has {offset!r:.100}."
        )
    table = raw.array(f"{name}.weight.nested_quant_map", "F32", (256,))
    absmax = raw.array(f"{name}.weight.nested_absmax", "F32", (-(-count // size),))
    with np.errstate(all="ignore"):  # what is not finite shows in the scales
        units: NDArray[np.float32] = table[codes] * absmax[np.arange(count) // size]
    return units + np.float32(float(number))


def _state(raw: RawFolder, name: str) -> Mapping[str, Any]:
    """The JSON that a linear carries."""
    key = next((f"{name}.{state}" for state in _STATES if f"{name}.{state}" in raw.tensors), "")
    stored = raw.array(key or f"{name}.{_STATES[0]}", "U8")
    try:
        state = json.loads(stored.tobytes().decode()) if stored.size <= _LONGEST else None
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise CheckpointError(
            f"a 4-bit linear must carry its state as a JSON object of up to {_LONGEST} bytes: {name!r} of {raw.path} "
            "does not."
        )
    return state


def _shape(raw: RawFolder, name: str, state: Mapping[str, Any]) -> tuple[int, int]:
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or any(type(n) is not int or n < 1 for n in shape):
        raise CheckpointError(
            f"a state must tell its matrix's shape: that of {name!r} of {raw.path} is {shape!r:.100}."
        )
    return shape[0], shape[1]


def _whole(raw: RawFolder, name: str, state: Mapping[str, Any], key: str) -> int:
    found = state.get(key)
    if type(found) is not int or not 1 <= found <= 2**16:
        raise CheckpointError(
            f"{key} must be a whole number up to 65536: {name!r} of {raw.path} has {found!r:.100}."
        )
    return found
