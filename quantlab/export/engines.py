"""Which engines load a scheme in a format, and how it runs there: the matrix of cards and certificates. No torch.

`here` are engines that `quantlab verify` starts; what it finds replaces what is said here. `elsewhere` are engines that
read the format by its documentation and were not run.
"""

from dataclasses import dataclass
from typing import Literal

from quantlab.schemes import Scheme, TensorSpec

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
    """gptqmodel reads all of it on a CPU; the others know 2, 3, 4 and 8 bits, auto-gptq with v1 zero points alone."""
    assert isinstance(scheme.weights, TensorSpec)
    bits, symmetric = scheme.weights.bits, scheme.weights.symmetric
    known = bits in (2, 3, 4, 8)
    unpacked = (
        "" if bits != 4 else " 4 bits in other groups than 32 to 256 need its backend `torch` on a CPU."
    )
    other = "" if known else "It knows 2, 3, 4 and 8 bits."
    v1 = known and symmetric
    marlin = "Marlin kernels." if symmetric else "Versions that know gptq_v2."
    return (
        Engine("gptqmodel", "here", "smaller", f"Computes in 16 bits.{unpacked}"),
        Engine(
            "transformers",
            "here" if known else "no",
            "smaller",
            other or f"Through optimum and gptqmodel.{unpacked}",
        ),
        Engine(
            "auto_gptq",
            "here" if v1 else "no",
            "smaller",
            other
            or ("0.7.1, of a Llama's linears without exception." if v1 else "It knows v1 zero points alone."),
        ),
        Engine(
            "vLLM",
            "elsewhere" if known else "no",
            "faster" if bits in (4, 8) else "smaller",
            other or (marlin if bits in (4, 8) else ""),
        ),
    )


def of_awq(scheme: Scheme) -> tuple[Engine, ...]:
    """gptqmodel has kernels for CPUs, which transformers takes too; vLLM has kernels."""
    return (
        Engine("gptqmodel", "here", "smaller", "Computes in 16 bits; knows no DiffLlama in this format."),
        Engine("transformers", "here", "smaller", "Through gptqmodel."),
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
    assert scheme.weights is not None
    takes = "" if scheme.weights.bits == 8 else f" A code of {scheme.weights.bits} bits takes a whole byte."
    note = f"Through torchao; weights become floats in every forward pass.{takes}"
    return (Engine("transformers", "here", "smaller", note),)


def of_quanto(scheme: Scheme) -> tuple[Engine, ...]:
    """optimum-quanto's own loader; transformers does not load what quanto saved."""
    assert scheme.weights is not None
    note = "Weights become floats in most forward passes."
    if scheme.weights.bits == 8:
        note = (
            "In bfloat16 on a CPU weights must be copied after loading, or torch's kernel ends the process."
        )
    return (
        Engine("quanto", "here", "smaller", note),
        Engine("transformers", "no", "smaller", "It makes such weights from floats and loads none."),
    )


def of_quantlab(scheme: Scheme) -> tuple[Engine, ...]:
    """quantlab."""
    return (Engine("quantlab", "here", "smaller"),)
