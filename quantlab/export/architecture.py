"""The architecture that other engines know a model by: quantlab's `standard` as Llama, its `diff_v1` as DiffLlama.

The conversion is exact but for the rounding of gains that are folded into o_proj once; the guard of transforms compares
the logits of both on real text. What has no such twin leaves in quantlab's own format.
"""

from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantlab.config import TextConfig
from quantlab.data.text import text_blocks
from quantlab.errors import ConfigError, SchemeError
from quantlab.models.converters.diffllama import to_diffllama
from quantlab.models.converters.llama import to_llama
from quantlab.transforms.guard import Guard

if TYPE_CHECKING:
    from quantlab.models.loading import Checkpoint

__all__ = ["known_to_engines"]

_TEXT = TextConfig(num_sequences=1, sequence_length=128)
"""What the two models are compared on."""


def known_to_engines(checkpoint: "Checkpoint", format_name: str) -> tuple["Checkpoint", tuple[str, ...]]:
    """The checkpoint as other engines know it, and what was done to it in words; itself where they do.

    Raises:
        SchemeError: an architecture of quantlab's own without a twin, or a twin that gives other logits.
    """
    if checkpoint.info.model_type != "quantlab" or format_name == "quantlab":
        return checkpoint, ()
    model, variant = checkpoint.model, checkpoint.info.variant
    converted = _converted(model, variant, format_name)
    blocks = text_blocks(_TEXT, checkpoint.tokenizer, num_embeddings=model.config.vocab_size)
    guard = Guard(model, torch.from_numpy(blocks.ids_NT))
    guard.model = converted
    twin = type(converted).__name__
    guard.check(f"conversion of {variant} to {twin}")
    note = f"converted from quantlab's {variant} to {twin}: the same logits but for rounding"
    return replace(checkpoint, model=converted), (note,)


def _converted(model: PreTrainedModel, variant: str | None, format_name: str) -> PreTrainedModel:
    """The twin, in the model's dtype and on its device."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not _is_tied(model, name)}
    try:
        if variant == "standard":
            moved, config = to_llama(state, model.config)
        else:
            moved, config = to_diffllama(state, model.config, fold_gain=True)
    except ConfigError as error:
        raise SchemeError(
            f"format {format_name} needs an architecture that its engines have: {variant} has no exact twin ({error}) "
            "Use --format quantlab."
        ) from error
    with torch.random.fork_rng(devices=[]):
        twin: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    missing, unexpected = twin.load_state_dict(moved, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, f"{missing}, {unexpected}"
    twin.tie_weights()
    twin.generation_config = deepcopy(model.generation_config)
    return twin.to(model.device).eval().requires_grad_(False)


def _is_tied(model: PreTrainedModel, name: str) -> bool:
    return bool(model.config.tie_word_embeddings) and name == "lm_head.weight"
