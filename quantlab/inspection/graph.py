"""Which modules of each architecture may exchange scale or rotation, as data. No torch.

What is not declared here is refused: a scale that passes from a value to the output projection is harmless in Llama
and changes the function in a Differential Transformer, whose heads are normalised in between. Names are relative to a
decoder layer, but those of `Residual`, which are the model's. A name may end in that of a parameter: a vector that
reads a norm as a linear of one output does.

Readers are complete: everything that sees a norm's output is listed, gates and the lambda of a token too.

Sources: SmoothQuant, arXiv:2211.10438 (norm to linears); AWQ, arXiv:2306.00978 (linear to linear); QuaRot,
arXiv:2404.00456 (rotations of the residual stream, of value heads and before down_proj).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from quantlab.inspection.architectures import OURS

__all__ = [
    "GRAPHS",
    "VARIANT_GRAPHS",
    "Graph",
    "Link",
    "Norm",
    "Residual",
    "Values",
    "graph_of",
    "rows_of",
    "sources_of",
]

Rows = Literal["all", "second_half", "last_values", "within_heads", "value_halves"]
"""Where the outputs that matter lie among the rows of a linear.

    all           every row, heads in order
    second_half   the second half (Phi-3's gate and up in one)
    last_values   the last rows, behind queries and keys (Phi-3, GPT-2)
    within_heads  the last third of each head's rows: query, key and value of a head lie together (GPT-NeoX)
    value_halves  value head j is rows of head j, then of head j + V, half of its channels each (DiffLlama)
"""


@dataclass(frozen=True)
class Norm:
    """A norm, and everything that reads what it gives."""

    name: str
    readers: tuple[str, ...]
    shifts: tuple[str, ...] = ()
    """Parameters that are added to the norm's output before anyone reads it; they scale as a bias does."""
    repeated: bool = False
    """One gain for the channels of a head, which every head shares; read by all heads side by side."""


@dataclass(frozen=True)
class Link:
    """Two linears: output channels of the first reach inputs of the second times a factor that ignores their scale."""

    source: str
    target: str
    rows: Rows = "all"


@dataclass(frozen=True)
class Values:
    """The linear that makes value heads, and the one that reads the heads of attention's output."""

    source: str
    target: str
    rows: Rows = "all"
    width: int = 1
    """Channels of a value head, in head_dim."""
    scales: bool = True
    """Whether a scale passes: false where a norm of each head stands in between."""
    gain: str | None = None
    """The norm in between whose gain must be folded before a head may be rotated."""
    inner: tuple[str, ...] = ()
    """Linears from a head's channels to the same channels in between, which turn with the head, and pass no scale."""


@dataclass(frozen=True)
class Residual:
    """The stream that layers read through norms and add to. RMS norms only: they alone commute with rotation."""

    embedding: str
    writers: tuple[str, ...]
    """In each layer."""
    final_norm: str
    head: str


@dataclass(frozen=True)
class Graph:
    """What is declared of one architecture."""

    layers: str
    norms: tuple[Norm, ...]
    links: tuple[Link, ...] = ()
    down: str = "mlp.down_proj"
    """The linear that ends the FFN, whose inputs may be rotated as they arrive."""
    values: Values | None = None
    residual: Residual | None = None
    unrotated: str = ""
    """Why the residual stream may not be rotated; empty where it may."""
    norm_offset: float = 0.0
    """Norms multiply by norm_offset + weight: 1 in Gemma."""
    needs: tuple[tuple[str, Any], ...] = ()
    """Fields of the config and the value that each must have for this graph to hold."""


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = (Link("mlp.up_proj", "mlp.down_proj"),)
_RESIDUAL = Residual("model.embed_tokens", ("self_attn.o_proj", "mlp.down_proj"), "model.norm", "lm_head")
_VALUES = Values("self_attn.v_proj", "self_attn.o_proj")


def _llama(*attention_readers: str) -> Graph:
    """Llama with further readers of the first norm."""
    norms = (
        Norm("input_layernorm", (*_QKV, *attention_readers)),
        Norm("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    )
    return Graph("model.layers", norms, _GATED, values=_VALUES, residual=_RESIDUAL)


_LLAMA = _llama()
_LAYER_NORM = "LayerNorm subtracts a mean, which does not commute with rotation"
_GEMMA = replace(
    _LLAMA,
    norms=(_LLAMA.norms[0], replace(_LLAMA.norms[1], name="pre_feedforward_layernorm")),
    residual=None,
    unrotated="norms with gains stand between its linears and the residual stream",
    norm_offset=1.0,
)
_DIFFLLAMA = replace(_LLAMA, values=replace(_VALUES, rows="value_halves", width=2, scales=False))

GRAPHS: dict[str, Graph] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": replace(
        _LLAMA,
        norms=(
            Norm("input_layernorm", ("self_attn.qkv_proj",)),
            Norm("post_attention_layernorm", ("mlp.gate_up_proj",)),
        ),
        links=(Link("mlp.gate_up_proj", "mlp.down_proj", "second_half"),),
        values=Values("self_attn.qkv_proj", "self_attn.o_proj", "last_values"),
    ),
    "diffllama": _DIFFLLAMA,
    "gpt2": Graph(
        "transformer.h",
        (Norm("ln_1", ("attn.c_attn",)), Norm("ln_2", ("mlp.c_fc",))),
        down="mlp.c_proj",
        values=Values("attn.c_attn", "attn.c_proj", "last_values"),
        unrotated=_LAYER_NORM,
        needs=(("add_cross_attention", False),),
    ),
    "gpt_neox": Graph(
        "gpt_neox.layers",
        (
            Norm("input_layernorm", ("attention.query_key_value",)),
            Norm("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        ),
        down="mlp.dense_4h_to_h",
        values=Values("attention.query_key_value", "attention.dense", "within_heads"),
        unrotated=_LAYER_NORM,
    ),
    "opt": Graph(
        "model.decoder.layers",
        (Norm("self_attn_layer_norm", _QKV), Norm("final_layer_norm", ("fc1",))),
        down="fc2",
        values=Values("self_attn.v_proj", "self_attn.out_proj"),
        unrotated=_LAYER_NORM,
        needs=(("do_layer_norm_before", True), ("layer_norm_elementwise_affine", True)),
    ),
    "gptj": Graph(
        "transformer.h",
        (Norm("ln_1", ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in")),),
        down="mlp.fc_out",
        values=Values("attn.v_proj", "attn.out_proj"),
        unrotated=_LAYER_NORM,
    ),
    "gpt_neo": Graph(
        "transformer.h",
        (Norm("ln_1", tuple(f"attn.attention.{name}_proj" for name in "qkv")), Norm("ln_2", ("mlp.c_fc",))),
        down="mlp.c_proj",
        values=Values("attn.attention.v_proj", "attn.attention.out_proj"),
        unrotated=_LAYER_NORM,
    ),
    "bloom": Graph(
        "transformer.h",
        (
            Norm("input_layernorm", ("self_attention.query_key_value",)),
            Norm("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        ),
        down="mlp.dense_4h_to_h",
        values=Values("self_attention.query_key_value", "self_attention.dense", "within_heads"),
        unrotated=_LAYER_NORM,
        needs=(("apply_residual_connection_post_layernorm", False), ("slow_but_exact", False)),
    ),
    # Its values may be clipped (clip_qkv), which neither scales nor turns: not declared.
    "mpt": Graph(
        "transformer.blocks",
        (Norm("norm_1", ("attn.Wqkv",)), Norm("norm_2", ("ffn.up_proj",))),
        down="ffn.down_proj",
        unrotated=_LAYER_NORM,
    ),
    # Where its values lie depends on three fields of the config: not declared.
    "falcon": Graph(
        "transformer.h",
        (Norm("input_layernorm", ("self_attention.query_key_value", "mlp.dense_h_to_4h")),),
        down="mlp.dense_4h_to_h",
        unrotated=_LAYER_NORM,
        needs=(("new_decoder_architecture", False), ("parallel_attn", True)),
    ),
}
"""`model_type` -> Graph, but for quantlab's own models."""

_SUBLN = Norm("self_attn.subln", ("self_attn.o_proj",), repeated=True)
_DIFF_V1 = replace(
    _LLAMA,
    norms=(*_LLAMA.norms, _SUBLN),
    values=replace(_VALUES, width=2, scales=False, gain="self_attn.subln"),
)
_SHARED = tuple(f"self_attn.{name}_proj.{part}" for name in "qk" for part in ("base", "down"))

VARIANT_GRAPHS: dict[str, Graph] = {
    "standard": _LLAMA,
    "diff_v1": _DIFF_V1,
    "diff_v2": _llama("self_attn.lambda_proj"),
    "grouped_diff": _DIFF_V1,
    "shared_diff": replace(
        _DIFF_V1,
        norms=(Norm("input_layernorm", (*_SHARED, "self_attn.v_proj")), *_DIFF_V1.norms[1:]),
    ),
    "dex": replace(_LLAMA, values=replace(_VALUES, scales=False, inner=("self_attn.difference",))),
    "threshold_diff": _LLAMA,
    "clipped_softmax": _LLAMA,
    "softmax_plus_one": _LLAMA,
    "gated": _llama("self_attn.gate_proj"),
    "flow": _LLAMA,
    "continuous_depth": _LLAMA,
}
"""Variant of quantlab's own models -> Graph under its default options but for those that `graph_of` reads."""


def graph_of(
    model_type: str, variant: str | None = None, options: Mapping[str, Any] | None = None
) -> Graph | None:
    """What is declared of an architecture; None where nothing is.

    Args:
        variant, options: `variant` and `variant_options` of quantlab's own models.
    """
    if model_type != OURS:
        return GRAPHS.get(model_type)
    graph, options = VARIANT_GRAPHS.get(variant or "standard"), options or {}
    if graph is None:
        return None
    attention, ffn, *rest = graph.norms
    if options.get("flow_encoder"):
        attention = replace(attention, readers=(*attention.readers, "self_attn.flow_encoder.direction"))
    if variant == "continuous_depth" and options.get("conditioned", True):
        attention = replace(attention, shifts=("attention_condition.shift",))
        ffn = replace(ffn, shifts=("ffn_condition.shift",))
        graph = replace(graph, residual=None, unrotated="its block learns a scale of each channel by depth")
    if graph.values and options.get("pairing") == "halves":
        graph = replace(graph, values=replace(graph.values, rows="value_halves"))
    if graph.values and options.get("subln_affine") is False:
        graph, rest = replace(graph, values=replace(graph.values, gain=None)), []
    return replace(graph, norms=(attention, ffn, *rest))


def rows_of(rows: Rows, num_rows: int, width: int, num_values: int) -> list[int]:
    """Rows of a linear that make values, value head by value head.

    Args:
        num_rows: output channels of the linear.
        width: channels of a value head.
        num_values: value heads, where queries and keys lie before them.
    """
    if rows == "second_half":
        return list(range(num_rows // 2, num_rows))
    if rows == "last_values":
        return list(range(num_rows - num_values * width, num_rows))
    if rows == "within_heads":
        return [row for row in range(num_rows) if row // width % 3 == 2]
    if rows == "value_halves":
        half, heads = width // 2, num_rows // width
        return [
            (head + part * heads) * half + channel
            for head in range(heads)
            for part in range(2)
            for channel in range(half)
        ]
    return list(range(num_rows))


def sources_of(num_inputs: int, num_sources: int, width: int) -> list[int]:
    """For each input channel of a reader the source channel that it reads: output head h reads head h // n.

    Args:
        num_inputs, num_sources: channels; the former a multiple of the latter.
        width: channels of a head.
    """
    shared = num_inputs // num_sources
    return [channel // width // shared * width + channel % width for channel in range(num_inputs)]
