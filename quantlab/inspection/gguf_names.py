"""GGUF's names for what a Hugging Face model holds, one table an architecture, read both ways. No torch.

llama.cpp names tensors `blk.3.attn_q.weight` and sizes `llama.block_count`; `hf_name` and `config_of` turn them into
`model.layers.3.self_attn.q_proj.weight` and a config.json, `gguf_name` turns a name back. What such a table cannot say
(a scaled rotary embedding, sizes that differ between layers) is refused, never dropped.
Source: the tensor names and keys of the GGUF specification, and llama.cpp's converters for each architecture.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from quantlab.errors import CheckpointError, nearest
from quantlab.inspection.gguf_header import GgufArray, GgufHeader

Stored = Literal["permuted", "transposed"]
"""How llama.cpp's converter changed a tensor: rotary halves interleaved, biases too, or a weight [I, O] made [O, I]."""

_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


@dataclass(frozen=True)
class GgufArchitecture:
    """One architecture of llama.cpp, and the transformers model that it is."""

    model_type: str
    """What transformers calls it when it is read."""
    also: tuple[str, ...] = ()
    """Further model types that are stored as it."""
    outer: Mapping[str, str] = field(default_factory=lambda: _OUTER)
    """Module outside the decoder layers -> its name in transformers."""
    layer: Mapping[str, str] = field(default_factory=lambda: _LAYER)
    """Module within `blk.N` -> its name within `layers` of transformers."""
    layers: str = "model.layers"
    sizes: Mapping[str, str] = field(default_factory=lambda: _SIZES)
    """Metadata key after `ARCHITECTURE.` -> key of config.json."""
    stored: Mapping[str, Stored] = field(default_factory=dict)
    """Modules whose weights llama.cpp's converter changed."""


GGUF_ARCHITECTURES: dict[str, GgufArchitecture] = {
    "llama": GgufArchitecture(
        "llama", also=("mistral",), stored={"attn_q": "permuted", "attn_k": "permuted"}
    ),
    "qwen2": GgufArchitecture("qwen2"),
    "qwen3": GgufArchitecture("qwen3", layer=_LAYER | _QK_NORM),
    "gpt2": GgufArchitecture(
        "gpt2",
        outer={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        layer={
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        layers="transformer.h",
        sizes={
            "block_count": "n_layer",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "context_length": "n_positions",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        stored=dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), "transposed"),
    ),
}
"""`general.architecture` -> what it is; Mistral, SmolLM and their like are stored as llama. Left out are those whose
files do not say all (the attention scale of Gemma 2 27B, for one) and so cannot be rebuilt without guessing."""

TOKEN_IDS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unknown": "unk_token_id",
    "padding": "pad_token_id",
}
"""Key after `tokenizer.ggml.`, before `_token_id` -> key of config.json."""
_BIASES = {"attn_q": "attention_bias", "ffn_gate": "mlp_bias"}
"""Module whose bias tells -> key of a Llama's config.json."""
_TENSOR = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<module>\w+)\.(?P<leaf>weight|bias)")


def architecture_of(header: GgufHeader, path: Path) -> GgufArchitecture:
    """The architecture of a file, which must be one of GGUF_ARCHITECTURES."""
    if header.architecture not in GGUF_ARCHITECTURES:
        raise CheckpointError(
            f"GGUF architecture must be one of {', '.join(GGUF_ARCHITECTURES)}: {path} has "
            f"{header.architecture!r}.{nearest(header.architecture, GGUF_ARCHITECTURES)} Use the model's Hugging "
            f"Face folder instead."
        )
    return GGUF_ARCHITECTURES[header.architecture]


def hf_name(name: str, architecture: GgufArchitecture, path: Path) -> tuple[str, Stored | None]:
    """The name that transformers gives a GGUF tensor, and how its values were changed."""
    match = _TENSOR.fullmatch(name)
    layer, module, leaf = match.group("layer", "module", "leaf") if match else (None, name, "")
    table = architecture.outer if layer is None else architecture.layer
    if module not in table:
        raise CheckpointError(
            f"every tensor must have a place in the model: {path} holds {name!r}, which quantlab does not know in a "
            f"{architecture.model_type} model. Use its Hugging Face folder instead."
        )
    prefix = "" if layer is None else f"{architecture.layers}.{int(layer)}."
    return f"{prefix}{table[module]}.{leaf}", _stored(architecture, module, leaf)


def gguf_name(name: str, architecture: GgufArchitecture) -> tuple[str, Stored | None] | None:
    """What `hf_name` takes, for what it gives: a tensor's GGUF name and how its values change; None if it has none."""
    owner, _, leaf = name.rpartition(".")
    layer = re.fullmatch(rf"{re.escape(architecture.layers)}\.(\d+)\.(.+)", owner)
    table = architecture.layer if layer else architecture.outer
    modules = {module: own for own, module in table.items()}
    own = modules.get(layer[2] if layer else owner)
    if own is None or leaf not in ("weight", "bias"):
        return None
    return f"blk.{layer[1]}.{own}.{leaf}" if layer else f"{own}.{leaf}", _stored(architecture, own, leaf)


def _stored(architecture: GgufArchitecture, module: str, leaf: str) -> Stored | None:
    stored = architecture.stored.get(module)
    return None if stored == "transposed" and leaf == "bias" else stored


def config_of(header: GgufHeader, path: Path) -> dict[str, Any]:
    """The config.json that a GGUF file's metadata amounts to."""
    architecture = architecture_of(header, path)
    name = header.architecture
    scaling = header.metadata.get(f"{name}.rope.scaling.type", "none")
    if scaling != "none":
        raise CheckpointError(
            f"rotary embedding must be unscaled in a GGUF file: {path} scales it ({scaling}). Use the model's "
            f"Hugging Face folder instead."
        )
    config: dict[str, Any] = {"model_type": architecture.model_type}
    if architecture.model_type == "llama":
        config |= _given(header, {f"{name}.rope.dimension_count": "head_dim"}, path)
        # No key says so: llama.cpp uses the biases that it finds.
        config |= {key: f"blk.0.{module}.bias" in header.tensors for module, key in _BIASES.items()}
    config |= _given(header, {f"{name}.{key}": value for key, value in architecture.sizes.items()}, path)
    config |= _given(
        header, {f"tokenizer.ggml.{key}_token_id": value for key, value in TOKEN_IDS.items()}, path
    )
    if not isinstance(header.metadata.get("tokenizer.ggml.tokens"), GgufArray):
        raise CheckpointError(f"checkpoint must hold its tokenizer: {path} has no tokenizer.ggml.tokens.")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"checkpoint must hold an embedding: {path} has no matrix token_embd.weight.")
    return config | {
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }


def _given(header: GgufHeader, keys: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The metadata that is there, under config.json's names."""
    found = {keys[key]: header.metadata[key] for key in keys if key in header.metadata}
    for key, value in found.items():
        if isinstance(value, GgufArray | str):
            raise CheckpointError(f"{key} must be one number for all layers: {path} gives {value!r}.")
        if not isfinite(value):
            raise CheckpointError(f"{key} must be finite: {path} gives {value}.")
    return found
