"""The guard: after a transform the model must give the logits that it gave before, on real tokens, up to rounding.

What rounding can do depends on the model: the guard measures it. Every declared norm's gain is moved by one rounding
step of the model's dtype up or down, at random, and the logits are compared once more: that is the noise of this
function on these tokens. A transform rounds each weight that it touches once, and each activation differs by a
rounding; so its difference is a small multiple of that noise, where an illegal transform's does not depend on it.

    delta_t = |z'_t - z_t| / |z_t|   of each token's logits, less their mean (Euclidean norm, over the vocabulary)

must hold    median(delta) <= 2.5 noise (16 bits: 1.3),  max(delta) <= 16 noise
             noise = max(median of the moved gains' delta, 2 eps), eps that of float32 at least

Largest found for fold, smoothing, random scales and rotations, medians and single tokens, in units of the noise: toys
of all declared architectures 1.2 and 2.8 in float32, 0.8 and 2.0 in bfloat16 (a test holds 1.5 and 4); SmolLM2-135M
1.3 and 7.2 in float32, 0.7 and 4.0 in bfloat16. Scales through a norm of heads: 3.2 in bfloat16, 1e5 in float32;
scales of an FFN whose last linear is rotated already: 2.05 to 4.8 in bfloat16.

Letters: N sequences, T tokens, V entries of the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantlab.errors import SchemeError
from quantlab.transforms.edges import find_edges, graph_for
from quantlab.transforms.edit import Undo, locate, restore, set_vector_

__all__ = ["Difference", "Guard", "difference", "logits_of"]

TYPICAL, TYPICAL_16_BIT, WORST, FLOOR = 2.5, 1.3, 16.0, 2.0
"""Largest median, also of models in 16 bits, and largest single difference, in units of the noise; the smallest noise,
in eps of the dtype."""


@dataclass(frozen=True)
class Difference:
    """How far logits moved."""

    typical: float
    """Median over tokens of |z' - z| / |z|."""
    worst: float
    """Largest over tokens."""
    where: tuple[int, int]
    """(sequence, position) of the largest."""


class Guard:
    """Compares a model with what it was."""

    def __init__(
        self, model: nn.Module, ids_NT: Tensor, *, num_sequences: int = 2, num_tokens: int = 256
    ) -> None:
        """Remember the logits of the first sequences.

        Raises:
            SchemeError: there are no tokens, or the model's logits are not finite to begin with.
        """
        self.model, self.ids_NT = model, ids_NT[:num_sequences, :num_tokens]
        if not self.ids_NT.numel():
            raise SchemeError(
                f"a transform is checked on real tokens: found {list(ids_NT.shape)}. Give some text."
            )
        self.before_NTV = logits_of(model, self.ids_NT)
        if not bool(torch.isfinite(self.before_NTV).all()):
            raise SchemeError("logits must be finite before a transform: this model gives NaN or infinity.")

    def apply(self, name: str, change: Callable[[Undo], list[str]], undo: Undo) -> list[str]:
        """Make a change, compare, and take it back where it fails or moved the logits beyond rounding.

        Raises:
            SchemeError: the logits moved; the message gives the worst counterexample. The model is as it was.
        """
        start = len(undo)
        try:
            notes = change(undo)
            self.check(name)
        except BaseException:
            restore(undo, start)
            raise
        return notes

    def check(self, name: str) -> Difference:
        """How far the logits are from what they were.

        Raises:
            SchemeError: further than rounding explains.
        """
        after_NTV = logits_of(self.model, self.ids_NT)
        found, noise = difference(self.before_NTV, after_NTV), self.noise(after_NTV)
        # Written so that NaN fails.
        typical = TYPICAL if next(self.model.parameters()).dtype.itemsize > 2 else TYPICAL_16_BIT
        if not (found.typical <= typical * noise and found.worst <= WORST * noise):
            raise SchemeError(self._counterexample(name, after_NTV, found, noise))
        return found

    def noise(self, logits_NTV: Tensor) -> float:
        """What one rounding of every norm's gain does to the logits of the model as it is now."""
        dtype = next(self.model.parameters()).dtype
        # Norms compute in float32 whatever the dtype.
        eps, undo = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps), Undo()
        try:
            _move_gains_(self.model, eps, undo)
            moved = difference(logits_NTV, logits_of(self.model, self.ids_NT)).typical
        finally:
            restore(undo)
        return max(moved, FLOOR * eps)

    def _counterexample(self, name: str, after_NTV: Tensor, found: Difference, noise: float) -> str:
        n, t = found.where
        token = int((after_NTV[n, t] - self.before_NTV[n, t]).abs().nan_to_num(torch.inf).argmax())
        before, after = float(self.before_NTV[n, t, token]), float(after_NTV[n, t, token])
        return (
            f"{name} must not change the function: logits moved by {found.typical:.2g} of their size at the median "
            f"token and {found.worst:.2g} at the worst, where rounding moves {noise:.2g}; sequence {n}, position {t}, "
            f"after token {int(self.ids_NT[n, t])}: the logit of token {token} was {before:.6g} and is {after:.6g}. "
            "It was undone; leave it out."
        )


def logits_of(model: nn.Module, ids_NT: Tensor) -> Tensor:
    """[N, T, V], float32, one sequence at a time."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return torch.cat([model(row[None].to(device), use_cache=False).logits.float() for row in ids_NT])


def difference(before_NTV: Tensor, after_NTV: Tensor) -> Difference:
    """How far logits moved, in parts of their own size; NaN counts as infinitely far."""
    size_NT = (before_NTV - before_NTV.mean(-1, keepdim=True)).norm(dim=-1)
    moved_NTV = after_NTV - before_NTV
    moved_NT = (moved_NTV - moved_NTV.mean(-1, keepdim=True)).norm(dim=-1)
    delta_NT = torch.where(size_NT > 0, moved_NT / size_NT, moved_NT).nan_to_num(torch.inf)
    place = int(delta_NT.argmax())
    return Difference(
        float(delta_NT.median()),
        float(delta_NT.max()),
        (place // delta_NT.shape[1], place % delta_NT.shape[1]),
    )


def _move_gains_(model: nn.Module, eps: float, undo: Undo) -> None:
    """Every declared norm's gain, one step up or down."""
    generator, graph = torch.Generator().manual_seed(0), graph_for(model)
    names = [edge.source for edge in find_edges(model, ("norm", "head_norm"))]
    names += [graph.residual.final_norm] if graph.residual else []
    offset = graph.norm_offset
    for name in names:
        gain = getattr(locate(model, name)[0], "weight", None)
        if gain is not None:
            signs = torch.randint(0, 2, gain.shape, generator=generator).to(gain.device) * 2 - 1
            set_vector_(
                model, name, undo, weight=(gain.detach().double() + offset) * (1 + eps * signs) - offset
            )
