"""Which engines load a scheme in a format, and how it runs there: the matrix of cards and certificates. No torch.

`here` are engines that `quantlab verify` starts; what it finds replaces what is said here. `elsewhere` are engines that
read the format by its documentation and were not run.
"""

from dataclasses import dataclass
from typing import Literal

from quantlab.schemes import Scheme

__all__ = [
    "Engine",
    "of_awq",
    "of_bitsandbytes",
    "of_compressed_tensors",
    "of_gguf",
    "of_gptq",
    "of_quantlab",
    "of_quanto",
    "of_torchao",
]


@dataclass(frozen=True)
class Engine:
    """One engine and one kind of folder."""

    name: str
    """A file of `quantlab.verify.engines` where it can be started, else what people call it."""
    loads: Literal["here", "elsewhere", "no"]
    speed: Literal["faster", "smaller", "simulated"]
    """What low bits are good for there: fast kernels, only a smaller file, or neither."""
    note: str = ""
    """A sentence."""


def of_compressed_tensors(scheme: Scheme) -> tuple[Engine, ...]:
    """transformers unpacks at the first forward pass; vLLM has kernels for some widths."""
    assert scheme.weights is not None
    bits = scheme.weights.bits
    unpacks = "Weights are unpacked to floats at the first forward pass."
    if scheme.activations is not None:
        step = "Its step of activations is absmax / 127.5, where vLLM and quantlab take absmax / 127."
        return (
            Engine("transformers", "here", "simulated", f"{unpacks} {step}"),
            Engine("vLLM", "elsewhere", "faster", "Integer products."),
        )
    if scheme.format == "fp8":
        vllm = Engine("vLLM", "elsewhere", "faster", "On GPUs with 8-bit floats.")
    elif bits in (4, 8):
        vllm = Engine(
            "vLLM", "elsewhere", "faster", "Marlin kernels for channels and groups of 32, 64 or 128."
        )
    else:
        vllm = Engine("vLLM", "no", "smaller", f"It has no kernel for {bits}-bit weights.")
    return (Engine("transformers", "here", "smaller", unpacks), vllm)


def of_gptq(scheme: Scheme) -> tuple[Engine, ...]:
    """gptqmodel runs it on a CPU; vLLM has kernels for 4 and 8 bits."""
    assert scheme.weights is not None
    fast = scheme.weights.bits in (4, 8)
    return (
        Engine("gptqmodel", "here", "smaller", "Reads 2, 3, 4 and 8 bits on a CPU."),
        Engine("transformers", "here", "smaller", "Through optimum and gptqmodel."),
        Engine("auto_gptq", "here", "smaller", "0.7.1, in an environment of its own; v1 zero points only."),
        Engine("vLLM", "elsewhere" if fast else "no", "faster" if fast else "smaller"),
    )


def of_awq(scheme: Scheme) -> tuple[Engine, ...]:
    """gptqmodel has a reader for CPUs; vLLM has kernels."""
    return (
        Engine("gptqmodel", "here", "smaller"),
        Engine("vLLM", "elsewhere", "faster", "AWQ and Marlin kernels."),
    )


def of_bitsandbytes(scheme: Scheme) -> tuple[Engine, ...]:
    """transformers, with bitsandbytes' own kernels."""
    if scheme.format == "llm_int8":
        note = "Inputs pass through float16; on a CPU slower than floats."
        return (
            Engine("transformers", "here", "smaller", note),
            Engine("vLLM", "elsewhere", "smaller"),
        )
    note = (
        "On CPUs with AVX512-BF16 inputs and scales are rounded to bfloat16, outputs must be a multiple of 32, and "
        "single tokens are faster; elsewhere weights are dequantized."
    )
    return (Engine("transformers", "here", "faster", note), Engine("vLLM", "elsewhere", "smaller"))


def of_gguf(scheme: Scheme) -> tuple[Engine, ...]:
    """llama.cpp runs it; transformers dequantizes."""
    if scheme.weights is None:
        return (
            Engine("llama_cpp", "here", "simulated", "Floats; it keeps keys and values in 16 bits."),
            Engine("transformers", "here", "simulated", "Floats."),
        )
    return (
        Engine("llama_cpp", "here", "faster", "Its inputs of linears are rounded to 8 bits."),
        Engine("transformers", "here", "simulated", "Dequantized to floats while it loads."),
    )


def of_torchao(scheme: Scheme) -> tuple[Engine, ...]:
    """transformers, through torchao."""
    return (Engine("transformers", "here", "smaller", "Through torchao."),)


def of_quanto(scheme: Scheme) -> tuple[Engine, ...]:
    """optimum-quanto's own loader."""
    return (Engine("quanto", "here", "smaller"),)


def of_quantlab(scheme: Scheme) -> tuple[Engine, ...]:
    """quantlab."""
    return (Engine("quantlab", "here", "smaller"),)
