"""Whether a model's attention is its own inside `attention_sites`, tried on tokens before a scheme stands there.

Letters: T tokens, V entries of the vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from probes.attention import attention_sites, outside_sites
from quantlab.errors import SchemeError

__all__ = ["check_same_attention", "num_trial_tokens"]

TRIAL_TOKENS = 32
"""Tokens that are tried where every query reads all keys that it may."""
MOST_NOISE = 4
"""Largest difference of a token, in units of what one rounding of the embeddings does to one. Toys of all families with
sites: at most 0.95 in float32, 0.73 in bfloat16."""


def check_same_attention(model: nn.Module) -> None:
    """Try some tokens, since only a forward pass tells whether attention goes through its sites and is the model's own.

    delta_t = |z'_t - z_t| / |z_t| of each token's logits z, inside and outside of the sites, is a matter of rounding.
    How much rounding does is measured: each embedding is moved by one rounding step of the dtype. Attention
    that reads other keys, or knows of no bias, moves logits by 1e-2 and more; the noise in float32 is about 1e-6.

    Raises:
        ProbeError: it does not go through its sites; the message names the architecture.
        SchemeError: it does, and gives other logits there.
    """
    weight = next(model.parameters())
    if weight.is_meta:  # of a model that is streamed, the calibration tells
        return
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    ids_1T = _trial(model, len(next(embedding.parameters()))).to(weight.device)
    with torch.no_grad():
        with outside_sites(model):
            own_TV = _logits(model, ids_1T)
            noise = max(_delta(own_TV, _moved(model, embedding, ids_1T)), 2 * torch.finfo(own_TV.dtype).eps)
        with attention_sites(model):
            found = _delta(own_TV, _logits(model, ids_1T))
    # Not a number fails too.
    if not found <= MOST_NOISE * noise:
        raise SchemeError(
            f"attention must be the same inside attention_sites: logits of {type(model).__name__} move by {found:.2g} "
            f"there over {ids_1T.shape[1]} tokens, and by {noise:.2g} under one rounding. Its hidden states can be "
            "observed and its linears quantized; what lies inside attention cannot."
        )


def num_trial_tokens(config: Any) -> int:
    """Tokens beyond which an attention that keeps some keys leaves some out; `TRIAL_TOKENS` where all are read.

    A sparse index says `index_topk`, or how many blocks of how many keys, and how many of the newest it always keeps.
    """
    numbers = {name: value for name, value in vars(config).items() if type(value) is int and value > 0}
    kept = [value for name, value in numbers.items() if name.endswith("topk") and "index" in name]
    for name, value in numbers.items():
        if name.endswith("topk_blocks"):
            prefix = name.removesuffix("topk_blocks")
            block = numbers.get(f"{prefix}block_size", 1)
            kept.append(block * (value + numbers.get(f"{prefix}local_blocks", 0) + 1))
    wanted = max([TRIAL_TOKENS, *(number + 1 for number in kept)])
    return min(wanted, numbers.get("max_position_embeddings", wanted))


def _trial(model: nn.Module, num_rows: int) -> Tensor:
    """Token ids [1, T], all over the vocabulary."""
    config: Any = getattr(model, "config", None)
    T = num_trial_tokens(config.get_text_config()) if hasattr(config, "get_text_config") else TRIAL_TOKENS
    return (torch.arange(T) * 7919 % num_rows)[None]


def _logits(model: nn.Module, ids_1T: Tensor) -> Tensor:
    """[T, V], at least float32, each token's less their mean."""
    logits: Tensor = model(ids_1T, use_cache=False).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits - logits.mean(-1, keepdim=True)


def _moved(model: nn.Module, embedding: nn.Module, ids_1T: Tensor) -> Tensor:
    """Logits of embeddings that are one rounding step away."""

    def step(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        sign = torch.randint(0, 2, output.shape, generator=generator).to(output.device, output.dtype) * 2 - 1
        return output + output * sign * torch.finfo(output.dtype).eps

    handle = embedding.register_forward_hook(step)
    try:
        return _logits(model, ids_1T)
    finally:
        handle.remove()


def _delta(before_TV: Tensor, after_TV: Tensor) -> float:
    """Largest over tokens of |z' - z| / |z|: it may be the last token alone that a key is left out for."""
    sizes_T = before_TV.norm(dim=-1).clamp_min(torch.finfo(before_TV.dtype).tiny)
    return float(((after_TV - before_TV).norm(dim=-1) / sizes_T).amax())
