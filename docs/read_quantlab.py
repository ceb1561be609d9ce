"""Read a folder in quantlab's format with numpy and safetensors alone: every linear in low bits as float32 [O, I]."""

import json
from pathlib import Path

import numpy as np
import safetensors


def unpack(tensor, rows, width, bits):  # rows of bits -> float32 [rows, width, 1]
    stream = np.frombuffer(tensor["data"], np.uint8).reshape(rows, -1)
    lines = np.unpackbits(stream, axis=1, count=width * bits, bitorder="little").reshape(rows, width, bits)
    return (lines @ np.exp2(np.arange(bits, dtype=np.float32)))[..., None]


def floats(tensor, rows):  # float32 [rows, G, 1]; a BF16 is the upper half of one
    array = np.frombuffer(tensor["data"], {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor["dtype"]])
    wide = array.astype(np.uint32) << 16 if tensor["dtype"] == "BF16" else array.astype(np.float32)
    return wide.view(np.float32).reshape(rows, -1, 1)


def scales(entry, own, rows, groups):
    if entry.get("scale_type", "float") == "float":
        return floats(own["scale"], rows)
    n = np.frombuffer(own["scale"]["data"], np.uint8).astype(np.int32).reshape(rows, groups, 1)
    if entry["scale_type"] == "e8m0":
        return np.ldexp(np.float32(1), n - 127)
    mantissa = ((n & 7) / 8 + (n > 7)).astype(np.float32)  # of an E4M3
    return np.ldexp(mantissa, np.maximum(n >> 3, 1) - 7) * floats(own["matrix_scale"], 1)


def matrix(entry, own, tables):  # every operation is rounded to float32 by itself, in this order
    (rows, width), (of_rows, groups), bits = entry["shape"], entry["scale"], entry["bits"]
    codes, zero = unpack(own["codes"], rows, width, bits).reshape(rows, groups, -1), 2.0 ** (bits - 1)
    if entry["kind"] == "table":
        values = np.frombuffer(bytes.fromhex(tables[entry["table"]]["float32"]), "<f4")
        return values[codes.astype(int)] * scales(entry, own, of_rows, groups)
    if entry["kind"] == "affine":
        if zeros := own.get("zero_point"):
            zero = unpack(zeros, of_rows, groups, bits) if zeros["dtype"] == "U8" else floats(zeros, of_rows)
        return (codes - zero) * scales(entry, own, of_rows, groups)
    d = np.repeat(floats(own["d"], rows), groups // own["d"]["shape"][1], 1)
    if "sub_scales" in own:
        of_sub, less = {"Q6_K": (8, 128), "Q3_K": (6, 32)}.get(entry["block"], (6, 0))
        d = d * (unpack(own["sub_scales"], rows, groups, of_sub) - np.float32(less))
    if "dmin" not in own:
        return (codes - zero) * d
    dmin = np.repeat(floats(own["dmin"], rows), groups // own["dmin"]["shape"][1], 1)
    m = -unpack(own["sub_mins"], rows, groups, 6) if "sub_mins" in own else np.float32(1)
    return codes * d + dmin * m


def read(folder):
    config = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    own = {name: {} for name, e in config["linears"].items() if e["kind"] in ("affine", "table", "block")}
    for file in Path(folder).glob("*.safetensors"):
        for name, tensor in safetensors.deserialize(file.read_bytes()):
            own.get(name.rpartition(".")[0], {})[name.rpartition(".")[2]] = tensor
    entries, tables = config["linears"], config.get("tables")
    return {k: matrix(entries[k], t, tables).reshape(entries[k]["shape"]) for k, t in own.items()}
