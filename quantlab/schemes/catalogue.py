"""The words of scheme names: common schemes, weight methods, transforms and formats, one line each."""

from collections.abc import Mapping
from dataclasses import dataclass

from quantlab.schemes.spec import WeightFormat

__all__ = ["METHODS", "SCHEMES", "TRANSFORMS", "WEIGHT_FORMATS", "Word", "explained"]

SCHEMES: dict[str, str] = {
    "w16": "the checkpoint as it is: the baseline of every comparison",
    "w8": "weights 8 bits, one scale per output channel; activations untouched",
    "w6": "weights 6 bits, one scale per output channel",
    "w4": "weights 4 bits, one scale per output channel",
    "w4g128": "weights 4 bits, one scale per 128 inputs",
    "w4g64": "weights 4 bits, one scale per 64 inputs",
    "w4g32z": "weights 4 bits, scale and zero point per 32 inputs (the grid of GGUF's Q4_1)",
    "w3g64": "weights 3 bits, one scale per 64 inputs",
    "w2g32": "weights 2 bits, one scale per 32 inputs",
    "w4g64-gptq": "the same codes chosen by GPTQ: each column's error goes into the columns after it",
    "w4g64-awq": "the same grid after AWQ's scaling and clip search",
    "w8a8": "weights and inputs of linears 8 bits, per channel and per token, as integer products",
    "w6a6": "weights and inputs of linears 6 bits, per channel and per token, as integer products",
    "w4a8": "weights 4 bits per channel, inputs of linears 8 bits per token, as integer products",
    "w4a4": "weights and inputs of linears 4 bits, per channel and per token, as integer products",
    "w8a8t": "inputs of linears share one scale per sequence instead of one per token",
    "w8a8ts": "inputs of linears share one scale of the whole calibration text",
    "w8a8-smooth": "w8a8 after SmoothQuant moved the outliers of inputs into the weights",
    "w4a4-rotate": "w4a4 after random Hadamard rotations of the residual stream, the values and the FFN (QuaRot)",
    "a8": "inputs of linears 8 bits per token; weights untouched",
    "kv8": "keys and values of the cache 8 bits, one scale per token and head",
    "kv4g32": "keys and values of the cache 4 bits, one scale per 32 channels of a token and head",
    "kv2czu128": "keys per channel, values per token, 2 bits in groups of 32 with minima, residual of 128 (KIVI)",
    "k8": "keys as they enter the attention product, 8 bits per token and head",
    "q8k8": "queries and keys as they enter the attention product, 8 bits per token and head",
    "l8t": "only attention logits, 8 bits, one scale per layer and sequence: the paper's protocol",
    "l6t": "only attention logits, 6 bits, one scale per layer and sequence: the paper's protocol",
    "l4t": "only attention logits, 4 bits, one scale per layer and sequence: the paper's protocol",
    "l8m": "only attention logits, 8 bits, one scale per map, layer and sequence: one attention call a map",
    "l6m": "only attention logits, 6 bits, one scale per map, layer and sequence",
    "l4m": "only attention logits, 4 bits, one scale per map, layer and sequence",
    "l4h": "only attention logits, 4 bits, one scale per head and sequence",
    "l4r": "only attention logits, 4 bits, one scale per head and query",
    "l4tm2": "only the logits of the subtracted map of differential attention, 4 bits",
    "p8t": "only attention probabilities, codes 0 to 255, one scale per layer and sequence",
    "x8": "only the outputs of decoder layers (hidden states), 8 bits per token",
    "d8": "only the lambda of each token (diff_v2), 8 bits",
    "e8t": "only the effective maps A1 - lambda A2 of differential attention, 8 bits",
    "w4g64a8l6t": "weights, activations and attention logits together",
    "nf4": "weights on NF4's 16 normal quantiles, one float scale per 64 inputs (bitsandbytes)",
    "llm_int8": "LLM.int8(): w8a8 but for input columns that reach 6 in a sequence, which stay at 16 bits",
}
"""Canonical names of common schemes, with one line each; any other name of the grammar is as good."""


@dataclass(frozen=True)
class Word:
    """A word after the dashes of a name."""

    summary: str
    needs: frozenset[str]
    """Of calibration: `tokens`, a text to run; `inputs`, statistics of the inputs of linears."""


_NOTHING: frozenset[str] = frozenset()
_TOKENS = frozenset({"tokens"})
_INPUTS = frozenset({"tokens", "inputs"})

METHODS: dict[str, Word] = {
    "rtn": Word("round to nearest; needs no word in a name", _NOTHING),
    "clip": Word("round to nearest in the shrunk range with the least squared error", _NOTHING),
    "wclip": Word("the same, errors weighted by the second moments of the inputs", _INPUTS),
    "gptq": Word("column after column, each error fed back into the rest (GPTQ)", _INPUTS),
    "awq": Word("input channels scaled by their magnitude before rounding, and clip search (AWQ)", _INPUTS),
    "hqq": Word(
        "zero points fitted to the weights alone, half-quadratically (HQQ); of grids with z", _NOTHING
    ),
    "autoround": Word("rounding learned by signed gradients, decoder layer by decoder layer", _TOKENS),
}
"""How weight codes are chosen."""

TRANSFORMS: dict[str, Word] = {
    "fold": Word("gains of norms go into the linears that read them", _TOKENS),
    "smooth": Word("outliers of inputs move into the weights through the norms (SmoothQuant)", _INPUTS),
    "rotate": Word("random Hadamard rotations that spread outliers over channels (QuaRot)", _TOKENS),
    "spin": Word("rotate with a learned rotation of the residual stream (after SpinQuant)", _TOKENS),
    "bias": Word("biases make up for the mean error of quantized weights", _INPUTS),
}
"""What is done to a model before (`bias`: after) it is quantized, in the order in which it is done."""

WEIGHT_FORMATS: Mapping[str, WeightFormat] = {
    form.name: form
    for form in (
        WeightFormat("nf4", 4, 64),
        WeightFormat("fp4", 4, 64),
        WeightFormat("nf4_dq", 4, 64),
        WeightFormat("fp4_dq", 4, 64),
        WeightFormat("fp8", 8),
        WeightFormat("fp8e5m2", 8),
        WeightFormat("mxfp4", 4, 32),
        WeightFormat("mxfp6", 6, 32),
        WeightFormat("mxfp6e3m2", 6, 32),
        WeightFormat("nvfp4", 4, 16),
        WeightFormat("llm_int8", 8),
        WeightFormat("q8_0", 8, 32),
        WeightFormat("q6_k", 6, 32),
        WeightFormat("q5_k", 5, 32),
        WeightFormat("q5_1", 5, 32),
        WeightFormat("q5_0", 5, 32),
        WeightFormat("q4_k", 4, 32),
        WeightFormat("q4_1", 4, 32),
        WeightFormat("q4_0", 4, 32),
        WeightFormat("q3_k", 3, 32),
    )
}
"""Formats that are schemes of weights by name."""

_GGUF_TYPES = {
    "q8_0": "8 bits, a float16 scale per 32 inputs",
    "q6_k": "6 bits, an 8-bit scale per 16 inputs",
    "q5_k": "5 bits, 6-bit scale and minimum per 32 inputs",
    "q5_1": "5 bits, float16 scale and minimum per 32 inputs",
    "q5_0": "5 bits, a float16 scale per 32 inputs",
    "q4_k": "4 bits, 6-bit scale and minimum per 32 inputs",
    "q4_1": "4 bits, float16 scale and minimum per 32 inputs",
    "q4_0": "4 bits, a float16 scale per 32 inputs",
    "q3_k": "3 bits, a 6-bit scale per 16 inputs",
}
_FALLBACKS = {"q6_k": "q8_0", "q5_k": "q5_1", "q4_k": "q5_0", "q3_k": "q4_0"}
"""What llama.cpp, and so quantlab, stores of a K type where 256 does not divide the inputs."""

MIXED = "mixed"
"""The last word of a name: bits of some linears come from `quantize.widths`."""
FORMATS_TO_COME = ("q2_k", "mxfp8")
"""Formats that are known and refused."""


def explained() -> dict[str, str]:
    """What each word and format adds to a name, in one line each."""
    return (
        {f"..-{name}": f"weights: {word.summary}" for name, word in METHODS.items() if name != "rtn"}
        | {f"..-{name}": f"transform: {word.summary}" for name, word in TRANSFORMS.items()}
        | {
            f"..-{MIXED}": "bits of some linears come from quantize.widths, as `quantlab allocate` writes them"
        }
        | {form.name: _of_format(form) for form in WEIGHT_FORMATS.values() if form.name not in SCHEMES}
    )


def _of_format(form: WeightFormat) -> str:
    if form.name in _GGUF_TYPES:
        instead = _FALLBACKS.get(form.name)
        otherwise = f"; {instead} where 256 does not divide the inputs" if instead else ""
        return f"weights in GGUF's type {form.name}: {_GGUF_TYPES[form.name]}{otherwise}"
    shares = f"{form.group_size} inputs" if form.group_size else "output channel"
    nested = ", itself in 8 bits (double quantization)" if form.name.endswith("_dq") else ""
    return f"weights in the format {form.name}: {form.bits} bits, one scale per {shares}{nested}"
