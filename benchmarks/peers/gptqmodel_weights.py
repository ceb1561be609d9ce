"""gptqmodel's GPTQ and AWQ of SmolLM2, in the environment of the peers.

    OMP_NUM_THREADS=1 .venv-peers/bin/python benchmarks/peers/gptqmodel_weights.py gptq

What it saves is unpacked here, in float32: its own kernels multiply in float16, which would round every weight anew.
O outputs, I inputs, G groups.
"""

import argparse
import os
import tempfile
from pathlib import Path

# Its pool of loaders asks for two workers, and a machine of two cores offers one.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from exchange import SMOLLM2, Stopwatch, calibration, leave
from gptqmodel import GPTQModel
from gptqmodel.looper.awq_processor import AWQProcessor
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.config import AWQConfig, BaseQuantizeConfig, GPTQConfig
from safetensors.torch import load_file
from torch import Tensor

BITS, GROUP = 4, 64
SCALE = 16 / GROUP
"""Bits a weight that a float16 scale for every group adds."""
COLUMNS_OF_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where the eight codes of a 32-bit word of AWQ's layout lie, the lowest bits first being 0."""

METHODS = {
    # The library's defaults: act_group_aware, which orders columns by importance within and across whole groups.
    "gptq": {},
    "gptq-plain": {"act_group_aware": False},
    "gptq-desc-act": {"desc_act": True},
    "gptq-static": {"desc_act": True, "static_groups": True},
    # Zero points, as in the paper and in autoawq.
    "awq": {"sym": False},
}


def config_of(method: str) -> BaseQuantizeConfig:
    """The library's settings of a method."""
    kind = AWQConfig if method == "awq" else GPTQConfig
    return kind(bits=BITS, group_size=GROUP, offload_to_disk=False, **METHODS[method])


class Features(Tensor):
    """Inputs [1, T, G, C] of AWQ's clip search, whose product with weights [O, 1, G, C] is only ever summed over C."""

    def __mul__(self, weight: Tensor) -> "Product":
        return Product(self.as_subclass(Tensor), weight)


class Product:
    """(x * w).sum(-1), [O, T, G], as one matrix product: 25 times as fast on a CPU."""

    def __init__(self, x: Tensor, w: Tensor) -> None:
        self.x, self.w = x, w

    def sum(self, dim: int) -> Tensor:
        assert dim == -1
        return torch.einsum("tgc,ogc->otg", self.x[0], self.w[:, 0])


def adapt_awq() -> None:
    """Let the library's AWQ run on a CPU, in float32 and without gigabytes of products; its choices stay its own."""
    # Checked when weights are packed, after the search: its packing computes in any dtype and stores float16 scales.
    AwqTorchLinear.SUPPORTS_DTYPES = [torch.float32, *AwqTorchLinear.SUPPORTS_DTYPES]
    search = AWQProcessor._compute_best_clip
    AWQProcessor._compute_best_clip = lambda self, w, x: search(self, w, x.as_subclass(Features))


def unpack(words: Tensor) -> Tensor:
    """The eight codes of every 32-bit word, lowest bits first: [..., 8]."""
    return (words.unsqueeze(-1) >> torch.arange(0, 32, BITS, dtype=torch.int32)) & 15


def dequantized_gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor) -> Tensor:
    """Weight [O, I] of the gptq layout: words [I / 8, O] and [G, O / 8], scales [G, O], zero points stored less one."""
    codes_IO = unpack(qweight).movedim(-1, 1).flatten(0, 1)
    zeros_GO = unpack(qzeros).flatten(1) + 1
    return ((codes_IO - zeros_GO[g_idx.long()]) * scales.float()[g_idx.long()]).T


def dequantized_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """Weight [O, I] of AWQ's gemm layout: words [I, O / 8] and [G, O / 8], scales [G, O]."""
    codes_IO, zeros_GO = (unpack(words)[..., COLUMNS_OF_AWQ].flatten(1) for words in (qweight, qzeros))
    g_idx = torch.arange(len(codes_IO)) // GROUP
    return ((codes_IO - zeros_GO[g_idx]) * scales.float()[g_idx]).T


def dequantized(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the decoder layers of a saved model, linears dequantized."""
    stored = {
        name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if ".layers." in name
    }
    found = {}
    for name in stored:
        module, _, kind = name.rpartition(".")
        packed = {
            key: stored[f"{module}.{key}"] for key in ("qweight", "qzeros", "scales") if kind == "qweight"
        }
        if packed:
            order = stored.get(f"{module}.g_idx")
            found[f"{module}.weight"] = (
                dequantized_awq(**packed) if order is None else dequantized_gptq(**packed, g_idx=order)
            )
        elif f"{module}.qweight" not in stored:
            found[name] = stored[name]
    return found


def main() -> None:
    """Quantize and leave the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--sequences", type=int, default=128, help="calibration blocks, from the first")
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    adapt_awq()
    config = config_of(options.method)
    model = GPTQModel.load(str(SMOLLM2), config, dtype=torch.float32, device="cpu")
    ids_NT = torch.from_numpy(calibration(options.sequences))
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids_NT]
    watch = Stopwatch()
    model.quantize(rows, batch_size=options.batch_size, calibration_sort=None)
    spent = watch.seconds()
    zero_points = 0 if config.sym else BITS / GROUP
    settings = {
        "method": options.method.upper(),
        "library": "gptqmodel",
        "bits": BITS,
        "group_size": GROUP,
        "storage_bits": BITS + SCALE + zero_points,
        "settings": METHODS[options.method],
        "calibration_tokens": ids_NT.numel(),
        **spent,
    }
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        name = f"gptqmodel-{options.method}" + (f"-{options.sequences}" if options.sequences != 128 else "")
        leave(name, dequantized(Path(folder)), settings)


if __name__ == "__main__":
    main()
