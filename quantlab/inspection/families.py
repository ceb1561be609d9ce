"""What quantlab knows of each architecture, as data. No torch.

An architecture that is not listed is loaded and scored all the same, one sequence at a time. `packable` is declared
only where a test holds packed scores against unpacked ones.
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Family:
    """How the models of one `model_type` are scored, and what their checkpoints must look like."""

    packable: bool = False
    """Several sequences may share a row: position ids restart, a 4D mask keeps them apart."""
    masks: Literal["single", "by_layer_type"] = "single"
    """The forward pass takes one mask, or a mapping from layer type to mask (sliding-window layers among others)."""
    llama_shapes: bool = False
    """Projections are named and shaped as in Llama, so that the config predicts every one of them."""
    head_dim_from_hidden: bool = False
    """A config without `head_dim` means hidden_size / num_attention_heads; elsewhere it means the class's default."""
    linear_class: Literal["Linear", "Conv1D", "FalconLinear"] = "Linear"
    """Class of the decoder's linears; Conv1D stores its weight as [in_features, out_features]."""
    base_prefix: str = ""
    """Name of the base model within the causal one. A checkpoint of the base model lacks it: the hub's GPT-2 stores
    `h.0.attn.c_attn`, which is `transformer.h.0.attn.c_attn` once loaded. Empty: stored names are kept."""


_LLAMA = Family(packable=True, llama_shapes=True, head_dim_from_hidden=True, base_prefix="model")
_LAYER_TYPES = replace(_LLAMA, masks="by_layer_type")
_SET_HEAD_DIM = replace(_LAYER_TYPES, head_dim_from_hidden=False)
_TRANSFORMER = Family(base_prefix="transformer")

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "diffllama": _LLAMA,
    "qwen2": _LAYER_TYPES,
    "qwen3": _SET_HEAD_DIM,
    "gemma2": _SET_HEAD_DIM,
    "gemma3_text": _SET_HEAD_DIM,
    "phi3": Family(packable=True, base_prefix="model"),
    "gpt_neox": Family(packable=True, base_prefix="gpt_neox"),
    "gpt2": replace(_TRANSFORMER, packable=True, linear_class="Conv1D"),
    "opt": Family(packable=True, base_prefix="model"),
    "gptj": _TRANSFORMER,
    "gpt_neo": _TRANSFORMER,
    "bloom": _TRANSFORMER,
    "mpt": _TRANSFORMER,
    "falcon": replace(_TRANSFORMER, linear_class="FalconLinear"),
    "quantlab": Family(packable=True, base_prefix="model"),
}
"""`model_type` of a config.json -> Family."""


NOT_PACKABLE = ("continuous_depth",)
"""Variants of quantlab's own models that are scored one sequence at a time: its steps over depth are its own."""


def family_of(model_type: str, variant: str | None = None) -> Family:
    """The family of a model_type; one that is not listed is scored unpacked.

    Args:
        variant: of quantlab's own models.
    """
    family = FAMILIES.get(model_type, Family())
    return replace(family, packable=False) if variant in NOT_PACKABLE else family
