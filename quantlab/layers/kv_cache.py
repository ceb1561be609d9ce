"""The cache of keys and values, quantized: what a query reads of a token that came before it.

    token by token       a scale for each token and head, or for groups of its channels (r, gN); fixed ranges (t, h, c)
    KIVI (c)             keys: a scale for each channel of a head and 32 consecutive tokens, counted from the
                         sequence's first; values: a scale for each token and 32 channels of a head

Without zero points grids are symmetric; with them (z) a group is stored as a scale and a real minimum, as KIVI and
ggml's caches have it, and its range need not hold 0.

With a window R a query reads its last R tokens, its own among them, as they are, and older ones from the cache. KIVI's
residual of R tokens, a multiple of 32, is another for keys and for values. Keys enter the cache R at a time, when a
block of R is complete and its last query has read it as it is: the query at position t reads keys before R floor(t / R)
from the cache. Values enter it one by one, behind the last R, also after the query has read: it reads values before
t - R from the cache. So no query depends on a later token, and a text scored in one pass reads what a decoder reads
token by token. (KIVI's own prefill attends to everything as it is and quantizes afterwards; no text would be scored.)

Both kinds round what the attention product would read: after rotary embedding, heads that share keys not repeated.

Source: Liu et al. 2024, KIVI, arXiv:2402.02750, section 3; the order of reading and storing, and groups of 32 for keys
and for values, as in the authors' code (github.com/jy-yuan/KIVI), whose scales and minima are float16, here float32.

Letters: B sequences, K key or value heads, T tokens, G groups of tokens, d channels.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from probes.sites import Aged, Newest
from quantlab.layers.fake_quant import FakeQuant, Where
from quantlab.numerics.dynamic import fake_quantize_in_range
from quantlab.numerics.ranges import absmax, min_max
from quantlab.numerics.static import Fixed
from quantlab.schemes import TensorSpec
from quantlab.schemes.places import CACHE_GROUP

__all__ = ["CachedHeads", "cached_share_", "first_token", "round_by_channel"]


class CachedHeads(nn.Module):
    """Stands at the site of keys or of values, and gives what queries read of the cache."""

    def __init__(
        self, spec: TensorSpec, what: Literal["keys", "values"], *, fixed: Fixed | None = None
    ) -> None:
        """`fixed` is the range of a static spec, from `numerics.static.static_range`."""
        super().__init__()
        self.spec, self.what = spec, what
        self.is_kivi = spec.granularity == "channel" and fixed is None
        self.by_channel = self.is_kivi and what == "keys"
        per_token = spec
        if self.is_kivi:
            per_token = TensorSpec(spec.bits, "group", CACHE_GROUP, symmetric=spec.symmetric)
        self.rounding = FakeQuant(per_token, "cache", fixed=fixed)
        self.reads = torch.zeros(2, dtype=torch.float64)
        """Pairs of a query and a token that it reads, of whole texts: older than the window, and all."""

    def forward(self, x: Tensor, tokens: Where) -> Tensor | Aged:
        """[B, K, T, d]: the cache's, or both where a window is unquantized."""
        past = round_by_channel(x, tokens.visible, self.spec) if self.by_channel else self.rounding(x, tokens)
        if self.spec.window is None:
            return past
        newest = self._newest(tokens, self.spec.window)
        self._count(tokens.visible.expand(len(x), -1, -1, -1), newest)
        return Aged(x, past, newest)

    def _newest(self, tokens: Where, window: int) -> Newest:
        """What a query does not read from the cache: in KIVI, what was there before it came, and itself."""
        if not self.is_kivi:
            return Newest(window)
        return Newest(1, window, first_token(tokens.visible)) if self.by_channel else Newest(window + 1)

    def _count(self, visible: Tensor, newest: Newest) -> None:
        length_B, tokens_T = visible.sum((1, 2, 3)), torch.arange(visible.shape[2], device=visible.device) + 1
        older_T = (tokens_T - newest.window).clamp(min=0) // newest.step * newest.step
        reads_BT = tokens_T <= length_B[:, None]
        pairs_2 = torch.stack(
            [(reads_BT * counts).sum(dtype=torch.float64) for counts in (older_T, tokens_T)]
        )
        self.reads = self.reads.to(pairs_2.device) + pairs_2

    def extra_repr(self) -> str:
        """What stands in the printed model: `keys, 4 bits, channel, window 128`."""
        window = "" if self.spec.window is None else f", window {self.spec.window}"
        return f"{self.what}, {self.spec.bits} bits, {self.spec.granularity}{window}"


def cached_share_(model: nn.Module) -> float | None:
    """Of what queries read since the last call, the share that was older than the window; None without a window.

    Counts begin anew.
    """
    windows = [
        module
        for module in model.modules()
        if isinstance(module, CachedHeads) and module.spec.window is not None
    ]
    if not windows:
        return None
    older, everything = sum((module.reads.cpu() for module in windows), torch.zeros(2)).tolist()
    for module in windows:
        module.reads = torch.zeros_like(module.reads)
    return older / everything if everything else 0.0


def round_by_channel(
    x: Tensor, visible: Tensor, spec: TensorSpec, *, group_size: int = CACHE_GROUP
) -> Tensor:
    """Keys [B, K, T, d] on grids of one channel and `group_size` consecutive tokens each; same shape and dtype.

    Args:
        visible: bool [B or 1, 1, T, 1]: tokens that are text. Groups start at the first of a sequence, and padding
            sets no scale.
    """
    # Padding on the left goes to the end for a moment: [B or 1, 1, T, 1] indices of the tokens in their new order.
    first = first_token(visible)
    here = torch.arange(x.shape[2], device=x.device)[:, None]
    order = (here + first) % x.shape[2]
    counted = _gather(x.masked_fill(~visible, 0.0), order)
    groups = functional.pad(counted, (0, 0, 0, -x.shape[2] % group_size)).unflatten(2, (-1, group_size))
    low, high = (absmax if spec.symmetric else min_max)(groups, (-2,))
    back = (here - first) % x.shape[2]
    low, high = (
        _gather(end.expand_as(groups).flatten(2, 3)[:, :, : x.shape[2]], back) for end in (low, high)
    )
    return fake_quantize_in_range(x, low, high, spec, "cache")


def first_token(visible: Tensor) -> Tensor:
    """Index of the first token that is text, [B or 1, 1, 1, 1], of bool [B or 1, 1, T, 1]."""
    return visible.int().argmax(2, keepdim=True)


def _gather(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of x [B, K, T, d] in the order [B or 1, 1, T, 1]."""
    return x.gather(2, order.expand(x.shape))
