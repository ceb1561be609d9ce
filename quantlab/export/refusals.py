"""What each format cannot hold of a scheme, in words; None where it holds all of it. Needs no torch."""

from dataclasses import replace

from quantlab.schemes import Scheme, TensorSpec

_CACHE = TensorSpec(8, "tensor", static=True)
"""The cache that compressed-tensors has scales for."""

__all__ = [
    "of_awq",
    "of_bitsandbytes",
    "of_compressed_tensors",
    "of_gguf",
    "of_gptq",
    "of_quantlab",
    "of_quanto",
    "of_torchao",
]

GGUF_TYPES = ("q8_0", "q6_k", "q5_k", "q5_0", "q5_1", "q4_k", "q4_0", "q4_1", "q3_k")
"""Weight formats whose blocks are ggml's."""
BITSANDBYTES = ("nf4", "fp4", "nf4_dq", "fp4_dq", "llm_int8")
"""Weight formats whose codes are bitsandbytes'."""
ONLINE = ("rotate", "spin")
"""Transforms that leave work for the model's forward pass."""


def of_compressed_tensors(scheme: Scheme) -> str | None:
    """pack-quantized (weights only), int-quantized (w8a8) and float-quantized (fp8), and a cache with static scales."""
    if scheme.cache == _CACHE:
        scheme = replace(scheme, cache=None)
    if reason := _beyond_weights(scheme):
        return reason
    if scheme.format == "fp8":
        return "fp8 goes with 16-bit activations" if scheme.activations is not None else None
    weights = scheme.weights
    if not isinstance(weights, TensorSpec):
        return f"its weights are {scheme.format}"
    if weights.granularity not in ("channel", "group"):
        return "weights need a scale per channel or per group"
    if not weights.symmetric:
        return "transformers does not load this format's packed zero points"
    if scheme.activations is None:
        return None
    activations = scheme.activations
    if (activations.bits, activations.granularity, activations.symmetric) != (8, "row", True):
        return "activations go with it at 8 bits, symmetric, with a dynamic scale per token"
    if (weights.bits, weights.granularity) != (8, "channel"):
        return "8-bit activations go with 8-bit weights and a scale per channel"
    return None


def of_gptq(scheme: Scheme) -> str | None:
    """2 to 8 bits, per channel or in groups that gptqmodel reads, with or without whole zero points."""
    if reason := _beyond_weights(scheme) or _not_on_a_grid(scheme, tuple(range(2, 9))):
        return reason
    return _groups_beyond(scheme, 1024) or _real_zeros(scheme)


def of_awq(scheme: Scheme) -> str | None:
    """4 bits in groups that gptqmodel reads, the GEMM layout."""
    if reason := _beyond_weights(scheme) or _not_on_a_grid(scheme, (4,)):
        return reason
    if scheme.weights is not None and scheme.weights.group_size is None:
        return "weights need a scale per group"
    return _groups_beyond(scheme, 128) or _real_zeros(scheme)


def of_bitsandbytes(scheme: Scheme) -> str | None:
    """Its own arithmetics by name."""
    return _beyond_weights(scheme) or _not_by_name(scheme, BITSANDBYTES)


def of_gguf(scheme: Scheme) -> str | None:
    """ggml's block types by name, and floats: the checkpoint as it is."""
    if scheme == Scheme():
        return None
    return _beyond_weights(scheme) or _not_by_name(scheme, GGUF_TYPES)


def of_torchao(scheme: Scheme) -> str | None:
    """Weights alone: 2 to 8 bits per channel or group, with or without whole zero points."""
    return _beyond_weights(scheme) or _not_on_a_grid(scheme, tuple(range(2, 9))) or _real_zeros(scheme)


def of_quanto(scheme: Scheme) -> str | None:
    """Weights alone: 8 bits symmetric per channel; 4 and 2 bits per channel or group, zero points too."""
    if reason := _beyond_weights(scheme) or _not_on_a_grid(scheme, (2, 4, 8)):
        return reason
    weights = scheme.weights
    assert isinstance(weights, TensorSpec)
    if weights.bits == 8 and (weights.granularity, weights.symmetric) != ("channel", True):
        return "8-bit weights need a symmetric grid with a scale per channel"
    return _real_zeros(scheme)


def of_quantlab(scheme: Scheme) -> str | None:
    """Everything that has codes of weights."""
    return "it leaves the weights at 16 bits" if scheme.weights is None else None


def _beyond_weights(scheme: Scheme) -> str | None:
    """Reasons that hold for every format of other engines."""
    if scheme.sites or scheme.head_sites or scheme.lambdas or scheme.hidden:
        return "a folder of weights carries no quantized attention, cache or hidden states"
    if scheme.weights is None:
        return "it leaves the weights at 16 bits"
    if online := [name for name in scheme.transforms if name in ONLINE]:
        return f"{online[0]} turns inputs as they arrive, which its engines do not"
    if "bias" in scheme.transforms:
        return "its engines give these linears no bias"
    if scheme.mixed:
        return "its engines take one width for all linears"
    return None


def _not_on_a_grid(scheme: Scheme, bits: tuple[int, ...]) -> str | None:
    """Weights alone, on a uniform grid of one of these widths, per channel or group."""
    weights = scheme.weights
    if scheme.activations is not None:
        return "it holds weights alone, and the scheme quantizes inputs of linears too"
    if not isinstance(weights, TensorSpec):
        return f"its weights are {scheme.format}"
    if weights.bits not in bits:
        return f"weights need {_listed([str(each) for each in bits])} bits"
    return (
        None
        if weights.granularity in ("channel", "group")
        else "weights need a scale per channel or per group"
    )


def _groups_beyond(scheme: Scheme, largest: int) -> str | None:
    """Groups are powers of 2 from 16, as gptqmodel's kernels have them."""
    assert scheme.weights is not None
    size = scheme.weights.group_size
    known = [2**power for power in range(4, largest.bit_length())]
    if size is None or size in known:
        return None
    return f"groups need {_listed([str(each) for each in known])} inputs"


def _real_zeros(scheme: Scheme) -> str | None:
    return "its zero points are real numbers, and the format's are whole" if scheme.method == "hqq" else None


def _not_by_name(scheme: Scheme, names: tuple[str, ...]) -> str | None:
    if scheme.format not in names:
        return "it holds formats with an arithmetic of their own"
    return "it holds weights alone" if scheme.activations is not None else None


def _listed(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
