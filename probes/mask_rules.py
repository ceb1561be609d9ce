"""Attention masks as rules: what a block of queries may see, evaluated when the block is computed.

transformers asks its mask interface for a T x T tensor per forward. `mask_rule` answers with an object that keeps the
mask function, the padding and the offsets instead, so memory stays O(block x T).

Letters: B sequences, T keys of the call.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from probes.errors import ProbeError
from probes.masks import Mask, Reach, TensorMask


class MaskRule(Mask):
    """A mask function of transformers with its padding and offsets, evaluated per block.

    It stands where a model expects a mask tensor; a model that computes with it does not go through the attention
    interface, and is told so.
    """

    def __init__(
        self,
        mask_function: Callable[..., Tensor],
        num_queries: int,
        num_keys: int,
        *,
        query_offset: int = 0,
        key_offset: int = 0,
        batch_size: int = 1,
        padding_BT: Tensor | None = None,
        use_vmap: bool = False,
        device: torch.device | str = "cpu",
        model_type: str = "this architecture",
    ) -> None:
        super().__init__()
        self.model_type = model_type
        self.num_queries, self.num_keys = num_queries, num_keys
        self.query_offset, self.key_offset = query_offset, key_offset
        self.batch_size = batch_size
        self.mask_function, self.use_vmap = mask_function, use_vmap
        self.padding_BT, self.device = padding_BT, device

    @property
    def _is_causal(self) -> bool:
        return self.mask_function is causal_mask_function and self.padding_BT is None

    def visible(self, start: int, stop: int, first: int, last: int) -> Tensor:
        """bool [B or 1, 1, stop - start, last - first]."""
        device = self.device
        rows = torch.arange(start, stop, device=device) + self.query_offset
        keys = torch.arange(first, last, device=device) + self.key_offset
        if self._is_causal:
            seen = torch.ones(1, 1, len(rows), len(keys), dtype=torch.bool, device=device)
            all_see = (
                start + self.query_offset - self.key_offset + 1
            )  # keys that the first row sees, so all do
            diagonal = max(0, all_see - first)
            seen[..., diagonal:] = keys[diagonal:] <= rows[:, None]
            return seen
        batch = torch.arange(self.batch_size, device=device)
        head = torch.zeros(1, dtype=torch.long, device=device)
        if self.use_vmap:
            seen = _vmapped(self.mask_function, batch, head, rows, keys)
        else:
            seen = self.mask_function(
                batch[:, None, None, None], head[None, :, None, None], rows[None, None, :, None], keys
            )
        if self.padding_BT is not None:
            # A padding token is hidden as a key and sees nothing as a query: its logits would be counted, and could
            # set a scale, so that a score depended on padding.
            seen = seen & self.padding_BT[:, None, None, keys] & self.padding_BT[:, None, rows, None]
        return seen

    def _find_reach(self, start: int, stop: int) -> Reach:
        shift = self.query_offset - self.key_offset
        if self._is_causal and start + shift >= 0 and stop + shift <= self.num_keys:
            return Reach(0, stop + shift, 0, start + shift + 1, blind=False)
        return super()._find_reach(start, stop)

    def text_queries(self) -> Tensor:
        """bool [B or 1, 1, queries, 1]: a token that is not padding sees itself, whatever the rule."""
        return self._text(self.query_offset, self.num_queries)

    def text_keys(self) -> Tensor:
        """bool [B or 1, 1, T, 1]."""
        return self._text(self.key_offset, self.num_keys)

    def _text(self, start: int, length: int) -> Tensor:
        if self.padding_BT is None:
            return torch.ones(1, 1, length, 1, dtype=torch.bool, device=self.device)
        return self.padding_BT[:, None, start : start + length, None]

    def to(self, *_: Any, **__: Any) -> "MaskRule":
        """Itself: dispatchers move what a layer is given; a rule is small and stays."""
        return self

    @classmethod
    def __torch_function__(cls, _: Any, __: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        rules = (value for value in (*args, *(kwargs or {}).values()) if isinstance(value, MaskRule))
        raise next(rules)._not_an_interface()

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__") or name not in dir(Tensor):
            raise AttributeError(name)
        raise self._not_an_interface()

    def _not_an_interface(self) -> ProbeError:
        return ProbeError(
            "Attention must go through transformers' AttentionInterface to have sites: "
            f"{self.model_type} computes with the mask itself, so its attention logits cannot be observed. "
            "Its hidden states can."
        )


def mask_rule(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **_: Any,
) -> MaskRule:
    """What transformers' `AttentionMaskInterface` calls; the arguments are its own, `attention_mask` is [B, seen]."""
    padding = attention_mask
    if padding is not None:
        padding = F.pad(padding, (0, max(0, kv_length + kv_offset - padding.shape[-1]))).bool()
        padding = None if bool(padding.all()) else padding
    return MaskRule(
        mask_function,
        q_length,
        kv_length,
        query_offset=int(q_offset),
        key_offset=int(kv_offset),
        batch_size=batch_size,
        padding_BT=padding,
        use_vmap=use_vmap,
        device=device,
        model_type=getattr(config, "model_type", "this architecture"),
    )


def as_mask(
    mask: "Mask | Tensor | None",
    num_queries: int,
    num_keys: int,
    *,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> Mask:
    """The mask of one attention call. None means what SDPA makes of it: causal (within the window) or everything."""
    if isinstance(mask, Tensor):
        return TensorMask(mask, num_queries, num_keys)
    if mask is None:
        rule = _everything if not causal else causal_mask_function
        if causal and window:
            rule = sliding_window_causal_mask_function(window)
        # One query is the newest of its keys; several are the first, as in SDPA (a static cache's prefill).
        offset = num_keys - 1 if num_queries == 1 else 0
        return MaskRule(rule, num_queries, num_keys, query_offset=offset, device=device)
    if not isinstance(mask, Mask):
        raise ProbeError(
            f"attention_sites reads masks that are rules, 4D tensors or None: found {type(mask).__name__}. "
            "Give a 4D tensor."
        )
    assert (mask.num_queries, mask.num_keys) == (num_queries, num_keys), "the mask belongs to another call"
    return mask


def _everything(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask function that hides nothing."""
    return (query >= 0) & (key >= 0)


def _vmapped(function: Callable[..., Tensor], *indices: Tensor) -> Tensor:
    """A mask function that only knows scalars, over the product of its four index vectors."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    for position in (3, 2, 1, 0):
        in_dims = tuple(0 if index == position else None for index in range(4))
        function = torch.vmap(function, in_dims=in_dims)
    with TransformGetItemToIndex():
        return function(*indices)
