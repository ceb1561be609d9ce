"""What every CPU, instruction set, thread count and backend gives bit for bit: codes, integer sums, integer linears.

The inputs are integers times powers of two, since random normal numbers differ between instruction sets themselves. The
hashes were taken from int64 arithmetic and float32 operations that round one element by itself, as IEEE 754 has them
(the second test); a CPU that gives others is in the wrong.
"""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from quantlab.kernels import integer, llm_int8, product
from quantlab.methods.llm_int8 import llm_int8 as quantize_llm_int8
from quantlab.methods.rtn import quantize_weight
from quantlab.numerics.affine import QuantizedTensor, quantize
from quantlab.numerics.dynamic import dynamic_qparams
from quantlab.numerics.qtype import QType
from quantlab.schemes import Scheme, TensorSpec

NAMES = ("w8a8", "w8a8t", "w4a8", "w8za8z", "w4za4z", "w6a6", "w4g128a8", "w3g256za8z")

HASHES = {
    "w8a8": "e7ec6d25a4a4a335",
    "w8a8t": "6def000f955c73da",
    "w4a8": "973da6dc0b67a6c8",
    "w8za8z": "1045fc360e0a4a3d",
    "w4za4z": "3fa39719bbe9ff8d",
    "w6a6": "4cc51c7d79360b37",
    "w4g128a8": "3571cb8aecefc463",
    "w3g256za8z": "4cc686586f298796",
    "sums": "6f34e43b7d7ed579",
    "llm_int8": "bc015d6f2bf58515",
}
"""Scheme -> SHA-256, cut to 16 digits, of its codes, sums and outputs."""


def numbers(rows: int, columns: int, seed: int) -> Tensor:
    """[rows, columns] float32, third powers of integers: most are small, few are large, and all are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-96, 97, (rows, columns), generator=generator).pow(3).float() / 2**14


def specs(name: str) -> tuple[TensorSpec, TensorSpec]:
    scheme = Scheme.parse(name)
    assert scheme.activations is not None and isinstance(scheme.weights, TensorSpec)
    return scheme.weights, scheme.activations


def codes_of(x: Tensor, inputs: TensorSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scale and zero point of inputs."""
    scale, zero_point = dynamic_qparams(x, inputs)
    return quantize(x, scale, zero_point, QType.of_activations(inputs)), scale, zero_point


def digest(*tensors: Tensor | None) -> str:
    """Of values, in the order of memory."""
    found = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def found_hashes() -> dict[str, str]:
    """Of every scheme, as this process computes it."""
    x, real, bias = numbers(37, 2304, 0).unsqueeze(0), numbers(48, 2304, 1), numbers(1, 48, 2)[0]
    found = {}
    for name in NAMES:
        weights, inputs = specs(name)
        weight = quantize_weight(real, weights)
        out = integer.linear(x, integer.Int8Weight(weight), bias, inputs)
        found[name] = digest(*codes_of(x, inputs), weight.codes, weight.scale, weight.zero_point, out)
    left, right = (
        numbers(size, 2304, seed).round().clamp(-128, 127).to(torch.int8) for size, seed in ((37, 3), (48, 4))
    )
    found["sums"] = digest(product.exact_product(left, right))
    inliers = x.clamp(-5.5, 5.5)
    found["llm_int8"] = digest(
        llm_int8.linear(inliers, llm_int8.LlmInt8Weight(quantize_llm_int8(real, "w")), bias)
    )
    return found


def test_codes_sums_and_outputs_are_those_of_every_cpu() -> None:
    assert found_hashes() == HASHES


@pytest.mark.parametrize("name", NAMES)
def test_the_hashes_are_of_exact_sums(name: str) -> None:
    """Codes less zero points are multiplied in int64; then each group's sum is rounded, scaled and added in turn."""
    x, real, bias = numbers(37, 2304, 0).unsqueeze(0), numbers(48, 2304, 1), numbers(1, 48, 2)[0]
    weights, inputs = specs(name)
    weight = quantize_weight(real, weights)
    codes, scale, zero_point = codes_of(x, inputs)
    centred = codes.long() if zero_point is None else codes.long() - zero_point
    out = expected_sums(centred[0], weight).unsqueeze(0) * scale + bias
    assert (
        digest(codes, scale, zero_point, weight.codes, weight.scale, weight.zero_point, out) == HASHES[name]
    )


def expected_sums(codes_TK: Tensor, weight: QuantizedTensor) -> Tensor:
    """sum over groups of s_w times the exact sum, [T, N] float32."""
    num_groups = weight.scale.shape[1]
    groups = weight.codes.long().unflatten(1, (num_groups, -1))
    if weight.zero_point is not None:
        groups = groups - weight.zero_point.unsqueeze(-1)
    total = torch.zeros(len(codes_TK), len(weight.codes))
    for group, columns in enumerate(codes_TK.unflatten(1, (num_groups, -1)).unbind(1)):
        term = (columns @ groups[:, group].t()).float() * weight.scale.expand(len(weight.codes), -1)[:, group]
        total = total + term if group else term
    return total


@pytest.mark.parametrize(
    "settings",
    [
        {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
        {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "2"},
    ],
    ids=lambda settings: ", ".join(f"{name}={value}" for name, value in settings.items()),
)
def test_instruction_sets_and_threads_change_no_bit(settings: dict[str, str]) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import json\nfrom {__name__} import found_hashes\nprint(json.dumps(found_hashes()))",
        ],
        env=os.environ | settings | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == HASHES
