"""Attention computed the plain way, with whole T x T tensors: what the tests of `probes` compare with.

Letters: B sequences, H heads, K key heads, T positions, d channels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

SUPPORTED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "diffllama",
)
REFUSED = ("gptj", "gpt_neo", "bloom", "mpt", "falcon")


@dataclass
class Seen:
    """One attention call: logits and probabilities [B, H, T, T], and which logits the mask lets through."""

    logits: Tensor
    probs: Tensor
    visible: Tensor


def plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> tuple[Tensor, Seen]:
    """Attention as eager computes it; a bool mask hides with -inf, a float mask is added. Output [B, T, H, d]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = q @ k.transpose(-1, -2) * scaling
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is None:
        visible = torch.ones_like(logits, dtype=torch.bool)
    elif mask.dtype == torch.bool:
        visible = mask.expand_as(logits)
    else:
        visible = (mask > torch.finfo(mask.dtype).min / 2).expand_as(logits)
        logits = logits + mask.masked_fill(~visible, 0.0)
    probs = (
        torch.softmax(logits.masked_fill(~visible, -torch.inf), -1, dtype=torch.float32)
        .nan_to_num(0.0)
        .to(q.dtype)
    )
    return (probs @ v).transpose(1, 2), Seen(logits, probs, visible)


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[dict[str, list[Seen]]]:
    """Run the model on `plain`, and record every attention call by the module's name."""
    names = {module: name for name, module in model.named_modules()}
    seen: dict[str, list[Seen]] = {}

    def attend(
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        output, call = plain(q, k, v, mask, scaling or q.shape[-1] ** -0.5, options.get("softcap"))
        seen.setdefault(names[module], []).append(call)
        return output.contiguous(), None

    AttentionInterface.register("plain", attend)
    AttentionMaskInterface.register("plain", bool_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("plain")
    try:
        yield seen
    finally:
        model.set_attn_implementation(before)


def bool_mask(*args: Any, **options: Any) -> Tensor | None:
    """The whole mask as bool, never left out."""
    return sdpa_mask(*args, **options | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


class Recorder:
    """A hook for sites that puts the blocks together again: `calls[name]` is a list of (tensor, visible), [B, H, T, T].

    What the site left out, since no query may see it, is NaN and not visible.
    """

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def see(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x, block = args
        batch, heads, rows, columns = x.shape
        calls = self.calls.setdefault(name, [])
        if block.start == 0:
            shape = (batch, heads, block.num_queries, block.num_keys)
            calls.append((torch.full(shape, torch.nan, dtype=x.dtype), torch.zeros(shape, dtype=torch.bool)))
        place = (
            ...,
            slice(block.start, block.start + rows),
            slice(block.key_start, block.key_start + columns),
        )
        whole, visible = calls[-1]
        whole[place], visible[place] = x, block.visible.expand_as(x)


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids of the toy vocabulary."""
    return torch.randint(0, 512, (batch, length), generator=torch.Generator().manual_seed(seed))


Factory = Callable[..., PreTrainedModel]
