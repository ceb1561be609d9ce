"""FakeQuant: values rounded to a grid and back, at any place where values pass.

At the site of a map it follows the protocol of `probes.sites.SwappedSite`: a scale that spans rows is found in a
first walk over all blocks of queries, so that the block size cannot change it. What the mask hides never sets a
scale and comes out as it went in. Scales are absmax or min-max of the logits themselves: softmax would not change
if a row's maximum were subtracted first, the codes would, so it is not. At the sites of queries, keys and values a
scale over tokens leaves padding out; such a scale knows of later tokens.

Letters: B sequences, H heads (all maps), q query rows of a block, t keys of a block, T tokens, d channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantlab.errors import CalibrationError
from quantlab.numerics.dynamic import dynamic_range, fake_quantize_in_range
from quantlab.numerics.granularity import Kind, spanned_dims
from quantlab.numerics.static import Fixed, static_range
from quantlab.schemes import TensorSpec

__all__ = ["FakeQuant", "QuantOutput"]


class Where(Protocol):
    """What is read of `probes.sites.QueryBlock` and `probes.sites.Tokens`."""

    @property
    def visible(self) -> Tensor:
        """bool, broadcastable to the tensor at the site: [B, H, q, t], or [B, H, T, d]."""


@dataclass(frozen=True)
class _Visible:
    """What is visible of some heads."""

    visible: Tensor


class FakeQuant(nn.Module):
    """Quantization and dequantization in a dynamic or a fixed range; same shape and dtype out."""

    low: Tensor | None
    high: Tensor | None
    """The fixed range, where there is one."""

    def __init__(
        self,
        spec: TensorSpec,
        kind: Kind,
        *,
        fixed: Fixed | None = None,
        heads: Sequence[int] | None = None,
        map_of_head: Sequence[int] | None = None,
    ) -> None:
        """What `kind` says is rounded.

        Args:
            kind: "inputs", of a linear [.., T, C], and "lambdas"; "heads", queries, keys or values [B, H, T, d];
                "map", logits or effective maps [B, H, q, t], and "probs", probabilities.
            fixed: the range of a static spec, from `numerics.static.static_range`.
            heads: of a map, those that are rounded and set the range; None for all.
            map_of_head: where each map has a scale of its own, which map each head belongs to.
        """
        super().__init__()
        assert spec.static == (fixed is not None), "a static spec goes with a range"
        assert (spec.granularity == "map") == (map_of_head is not None), "a scale per map goes with maps"
        self.spec, self.heads = spec, None if heads is None else list(heads)
        self.kind: Kind = kind
        self.is_map = kind in ("map", "probs")
        self.map_of_head = None if map_of_head is None else tuple(map_of_head)
        self.spans_tokens = -2 in spanned_dims(kind, spec) and fixed is None
        self.spans_rows = self.is_map and self.spans_tokens
        self._range: Fixed | None = None
        low, high = fixed or (None, None)
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)

    @classmethod
    def static(cls, spec: TensorSpec, kind: Kind, minimum: Tensor, maximum: Tensor) -> "FakeQuant":
        """In the range of a calibration's extremes: [I] for inputs, [H, C] for heads."""
        return cls(spec, kind, fixed=static_range(spec, minimum, maximum))

    def begin(self) -> None:
        """Forget the range of the last attention call."""
        self._range = None

    def observe(self, x: Tensor, block: Where) -> None:
        """Widen the range by the visible values of one block of queries."""
        low, high = self._dynamic(self._chosen(x), self._chosen(block.visible))
        if self._range is not None:
            low, high = torch.minimum(low, self._range[0]), torch.maximum(high, self._range[1])
        self._range = low, high

    def forward(self, x: Tensor, where: Where | None = None) -> Tensor:
        """x on the grid of its own range, of the fixed one, or of the observed one where scales span rows.

        Args:
            where: what counts, at a site of attention. What does not comes out of a map as it went in.
        """
        if self.heads is None or where is None:
            return self._rounded(x, where)
        out = x.clone()
        out[:, self.heads] = self._rounded(self._chosen(x), _Visible(self._chosen(where.visible)))
        return out

    def _rounded(self, x: Tensor, where: Where | None) -> Tensor:
        rounded = fake_quantize_in_range(x, *self._find_range(x, where), self.spec, self.kind)
        return torch.where(where.visible, rounded, x) if where is not None and self.is_map else rounded

    def _find_range(self, x: Tensor, where: Where | None) -> Fixed:
        if self.low is not None and self.high is not None:
            self._check_heads(x, self.low)
            return self.low, self.high
        if self.spans_rows and where is not None:
            assert self._range is not None, "a site whose scale spans rows must observe every block first"
            return self._range
        # Padding is asked for only where it could count: to find it, the whole mask may have to be evaluated.
        counts = where is not None and (self.is_map or self.spans_tokens)
        return self._dynamic(x, where.visible if where is not None and counts else None)

    def _dynamic(self, x: Tensor, visible: Tensor | None) -> Fixed:
        """The range of the values themselves; where maps have scales of their own, that of all heads of its map."""
        low, high = dynamic_range(x, self.kind, self.spec, visible)
        if self.map_of_head is None:
            return low, high
        assert len(self.map_of_head) == x.shape[1], "every head belongs to a map"
        low, high = low.clone(), high.clone()
        for which in set(self.map_of_head):
            heads = [head for head, its in enumerate(self.map_of_head) if its == which]
            low[:, heads] = low[:, heads].amin(1, keepdim=True)
            high[:, heads] = high[:, heads].amax(1, keepdim=True)
        return low, high

    def _check_heads(self, x: Tensor, low: Tensor) -> None:
        if self.kind == "heads" and (
            low.shape[0] not in (1, x.shape[1]) or low.shape[2] not in (1, x.shape[3])
        ):
            raise CalibrationError(
                f"static ranges must be of this layer's heads: calibration saw {low.shape[0]} heads of "
                f"{low.shape[2]} channels, {x.shape[1]} of {x.shape[3]} are here. Calibrate this model."
            )

    def _chosen(self, x: Tensor) -> Tensor:
        """The chosen heads of [B, H, ..]; a mask that is one for all heads stays it."""
        return x if self.heads is None or x.shape[1] == 1 else x[:, self.heads]

    def extra_repr(self) -> str:
        """What stands in the printed model: `8 bits, tensor`."""
        fixed = ", static" if self.spec.static else ""
        only = "" if self.heads is None else f", heads {', '.join(map(str, self.heads))}"
        return f"{self.spec.bits} bits, {self.spec.granularity}{fixed}{only}"


class QuantOutput(nn.Module):
    """A module whose output, or the first of a tuple, is rounded; for the rest it is what it was."""

    def __init__(self, inner: nn.Module, spec: TensorSpec, kind: Kind = "inputs") -> None:
        """The output is [.., T, C]."""
        super().__init__()
        self.inner, self.rounding = inner, FakeQuant(spec, kind)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives, rounded."""
        output = self.inner(*args, **kwargs)
        if isinstance(output, tuple):
            return (self.rounding(output[0]), *output[1:])
        return self.rounding(output)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the module itself, which models read (a layer's type, say)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)
