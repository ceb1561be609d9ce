"""What quantlab knows of each architecture, as data. No torch.

An architecture that is not listed is loaded and scored all the same, one sequence at a time. `packable` is declared
only where a test holds packed scores against unpacked ones.
"""

from dataclasses import dataclass
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
    transposed_linears: bool = False
    """Linears are stored [in_features, out_features] (GPT-2's Conv1D)."""


_LLAMA = Family(packable=True, llama_shapes=True, head_dim_from_hidden=True)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "diffllama": _LLAMA,
    "qwen2": Family(packable=True, masks="by_layer_type", llama_shapes=True, head_dim_from_hidden=True),
    "qwen3": Family(packable=True, masks="by_layer_type", llama_shapes=True),
    "gemma2": Family(packable=True, masks="by_layer_type", llama_shapes=True),
    "gemma3_text": Family(packable=True, masks="by_layer_type", llama_shapes=True),
    "phi3": Family(packable=True),
    "gpt_neox": Family(packable=True),
    "gpt2": Family(packable=True, transposed_linears=True),
    "opt": Family(packable=True),
}
"""`model_type` of a config.json -> Family."""


def family_of(model_type: str) -> Family:
    """The family of a model_type; one that is not listed is scored unpacked."""
    return FAMILIES.get(model_type, Family())
