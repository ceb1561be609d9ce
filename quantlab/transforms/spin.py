"""Spin: rotate, with a rotation of the residual stream that is learned, from where `rotate` starts.

    L(Q) = mean over tokens of KL(softmax z || softmax z_Q)

z are the model's logits, z_Q those of the model whose linears are rounded as they would be after the rotation:

    what reads the stream     q(x Q) q(W Q)^T         in place of x W^T
    what writes to it         q(x) (Q q(Q^T W))^T
    any other linear          q(x) q(W)^T             behind a rotation of x where there is one already

q rounds a vector to symmetric integers of a few bits with one scale, absmax / (2^(b - 1) - 1), and passes gradients as
they are (straight through). Weights may be left out of it: a method that fits codes to inputs, such as gptq, makes
other errors than q does, and a rotation that suits q's may be worse for them than a random one.

Q descends by Cayley steps (`cayley`). Sequences that give no gradient judge, and the Q with the lowest L on those is
kept, so that L there is never above that of the random rotation it starts from. A step is a forward and a backward
pass through the whole model, which must fit in memory with its activations. Where SpinQuant lowers the cross-entropy
of the text, L asks for the model's own distribution. Source: Liu et al. 2024, arXiv:2405.16406, which leaves weights
at 16 bits too where GPTQ follows.

Letters: N sequences, T tokens, D channels of the stream, O outputs, I inputs, R tokens of a batch, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantlab.errors import SchemeError
from quantlab.layers.rotated import RotatedLinear
from quantlab.layers.targets import find_targets
from quantlab.numerics.affine import choose_qparams, fake_quantize
from quantlab.numerics.qtype import QType
from quantlab.numerics.ranges import absmax
from quantlab.transforms.cayley import learn_rotation
from quantlab.transforms.edges import find_edges, graph_for, layer_names
from quantlab.transforms.edit import Undo, locate, replace_, restore
from quantlab.transforms.guard import logits_of
from quantlab.transforms.hadamard import random_rotation
from quantlab.transforms.rotate import PARTS, check_parts, fold_residual_, rotate_, rotate_residual_

__all__ = ["rounded", "spin_"]

_JUDGED = 8
"""One sequence of so many judges."""


# Callers may be in inference mode, whose tensors have no gradients.
@torch.inference_mode(False)
def spin_(
    model: nn.Module,
    ids_NT: Tensor,
    undo: Undo,
    *,
    seed: int = 0,
    parts: Sequence[str] = PARTS,
    bits: int = 4,
    weights: bool = True,
    num_steps: int = 30,
    batch_size: int = 2,
    learning_rate: float = 0.03,
) -> list[str]:
    """Rotate as `rotate_` does, with a learned rotation of the residual stream.

    Args:
        ids_NT: calibration tokens; one sequence of eight, and at least one, judges.
        bits: width of inputs and weights in the rounded model.
        weights: whether its weights are rounded at all.
        batch_size: sequences in a step.

    Returns:
        the divergence before and after learning, in a sentence, and what `rotate_` says.

    Raises:
        SchemeError: the architecture does not declare a part, its residual stream is not to turn, there is one
            sequence, or the divergence of the rounded model is not finite.
    """
    if "residual" not in parts:
        raise SchemeError(
            f"spin learns a rotation of the residual stream: found parts {', '.join(parts)}. Use rotate."
        )
    check_parts(model, parts, "spin")
    if len(ids_NT) < 2:
        raise SchemeError(
            f"spin learns from some sequences and judges by others: found {len(ids_NT)}. Give at least 2 "
            "(calibration.text.num_sequences and quantize.transforms.spin_sequences), or use rotate."
        )
    notes = fold_residual_(model, undo)
    others = [part for part in parts if part != "residual"]
    notes += rotate_(model, undo, seed=seed, parts=others) if others else []
    size = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    start_DD = random_rotation(size, torch.Generator().manual_seed(seed)).matrix
    num_judged = -(-len(ids_NT) // _JUDGED)
    q_DD, found = learn_rotation(
        start_DD.to(next(model.parameters()).device),
        _divergence_of(model, bits, weights),
        ids_NT[num_judged:],
        ids_NT[:num_judged],
        num_steps=num_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
    )
    rotate_residual_(model, lambda x: x @ q_DD.to(x), undo)
    what = "inputs and weights" if weights else "inputs"
    return [
        f"divergence of the model with {bits}-bit {what}, on sequences not learned from: {found[0]:.4g} nats with a "
        f"random rotation, {min(found):.4g} after {num_steps} steps.",
        *notes,
    ]


def rounded(x: Tensor, bits: int) -> Tensor:
    """x [..., n] on symmetric integers with a scale for each vector; the gradient is passed as it is. Dtype of x."""
    out: Tensor = _Rounded.apply(x, bits)  # type: ignore[no-untyped-call]
    return out


class _Rounded(torch.autograd.Function):
    """Rounding whose derivative is taken to be 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        qtype = QType(bits)
        scale, zero_point = choose_qparams(*absmax(x, (-1,)), qtype)
        return fake_quantize(x, scale, zero_point, qtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Turn:
    """The rotation that the rounded model is in at the moment, and what of it is rounded."""

    def __init__(self, bits: int, weights: bool) -> None:
        self.bits, self.weights = bits, weights
        self.q_DD = torch.empty(0)


class _Linear(nn.Module):
    """A linear of the rounded model; what rotates its inputs already comes first."""

    def __init__(self, linear: nn.Linear, turn: _Turn) -> None:
        super().__init__()
        self.linear, self.turn = linear, turn

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        x = self.linear.before(x) if isinstance(self.linear, RotatedLinear) else x
        weight_OI = self.rounded_weight() if self.turn.weights else self.linear.weight
        return F.linear(rounded(x, self.turn.bits), weight_OI, self.linear.bias)

    def rounded_weight(self) -> Tensor:
        """[O, I]."""
        return rounded(self.linear.weight, self.turn.bits)


class _Writer(_Linear):
    """One that writes to the stream."""

    def rounded_weight(self) -> Tensor:
        """[D, I]."""
        q_DD = self.turn.q_DD.to(self.linear.weight)
        return q_DD @ rounded(q_DD.T @ self.linear.weight, self.turn.bits)


class _Reader(_Linear):
    """One that reads the stream."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., O]."""
        turn, q_DD = self.turn, self.turn.q_DD.to(x)
        weight_OD = self.linear.weight @ q_DD
        weight_OD = rounded(weight_OD, turn.bits) if turn.weights else weight_OD
        return F.linear(rounded(x @ q_DD, turn.bits), weight_OD, self.linear.bias)


def _divergence_of(model: nn.Module, bits: int, weights: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """L of a rotation [D, D] and of sequences [n, T]; the model, whose norms are folded, is as before after each."""
    turn, undo, device = _Turn(bits, weights), Undo(), next(model.parameters()).device
    stand_ins = _stand_ins(model, turn)

    def divergence(q_DD: Tensor, ids_NT: Tensor) -> Tensor:
        wanted_RV = logits_of(model, ids_NT).flatten(0, 1).log_softmax(-1)
        turn.q_DD = q_DD
        try:
            for old, new in stand_ins.items():
                replace_(model, old, new, undo)
            logits_NTV = model(ids_NT.to(device), use_cache=False).logits
        finally:
            restore(undo)
        found_RV = logits_NTV.flatten(0, 1).float().log_softmax(-1)
        return F.kl_div(found_RV, wanted_RV, reduction="batchmean", log_target=True)

    return divergence


def _stand_ins(model: nn.Module, turn: _Turn) -> dict[nn.Module, nn.Module]:
    """What takes the place of every linear that schemes quantize; vectors that read the stream are none."""
    graph = graph_for(model)
    assert graph.residual is not None, "callers check the parts"
    names = {
        _Reader: [name for edge in find_edges(model, ("norm",)) for name in edge.readers],
        _Writer: [prefix + name for prefix in layer_names(model, graph) for name in graph.residual.writers],
    }
    kinds = {locate(model, name)[0]: kind for kind, those in names.items() for name in those}
    linears = [model.get_submodule(each.name) for each in find_targets(model) if each.sort == "linear"]
    return {
        linear: kinds.get(linear, _Linear)(linear, turn)
        for linear in linears
        if isinstance(linear, nn.Linear)
    }
