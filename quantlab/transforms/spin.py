"""Spin: rotate, with a rotation of the residual stream that is learned, from where `rotate` starts.

    L(Q) = mean over tokens of KL(softmax z || softmax z_Q)

z are the model's logits, z_Q those of the model whose linears are rounded as they would be after the rotation:

    inputs of what reads the stream   q(x Q) Q^T        rows of its matrices    q(w Q) Q^T
    inputs of what writes to it       q(x)              rows of its matrices    Q q(Q^T W)

q rounds a vector to symmetric integers of a few bits with one scale, absmax / (2^(b - 1) - 1), and passes gradients as
they are (straight through). Steps stay orthogonal by Cayley's transform; sequences that give no gradient judge, and
the Q with the lowest L on those is kept, so that L there is never above that of the random rotation it starts from.

    A = G Q^T - Q G^T,  Q' = (I + t A / 2)^-1 (I - t A / 2) Q,  t |A|_2 about `learning_rate`, falling to 0

A step is a forward and a backward pass through the whole model, which must fit in memory with its activations. Where
SpinQuant lowers the cross-entropy of the text, L asks for the model's own distribution. Source: Liu et al. 2024,
arXiv:2405.16406, section 3; Cayley SGD, Li et al. 2020, arXiv:2002.01113.

Letters: N sequences, T tokens, D channels of the stream, O outputs, I inputs, R tokens of a batch, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantlab.errors import SchemeError
from quantlab.numerics.affine import choose_qparams, fake_quantize
from quantlab.numerics.qtype import QType
from quantlab.numerics.ranges import absmax
from quantlab.transforms.edges import find_edges, graph_for, layer_names
from quantlab.transforms.edit import Undo, locate, replace_, restore
from quantlab.transforms.guard import logits_of
from quantlab.transforms.hadamard import random_rotation
from quantlab.transforms.rotate import PARTS, check_parts, fold_residual_, rotate_, rotate_residual_

__all__ = ["learn_rotation", "rounded", "spin_"]

_EVERY = 5
"""Steps between two judgements."""
_JUDGED = 8
"""One sequence of so many judges."""


def spin_(
    model: nn.Module,
    ids_NT: Tensor,
    undo: Undo,
    *,
    seed: int = 0,
    parts: Sequence[str] = PARTS,
    bits: int = 4,
    num_steps: int = 30,
    batch_size: int = 2,
    learning_rate: float = 0.03,
) -> list[str]:
    """Rotate as `rotate_` does, with a learned rotation of the residual stream.

    Args:
        ids_NT: calibration tokens; one sequence of eight, and at least one, judges.
        bits: width of inputs and weights in the rounded model.
        batch_size: sequences in a step.

    Returns:
        the divergence before and after learning, in a sentence, and what `rotate_` says.

    Raises:
        SchemeError: the architecture does not declare a part, its residual stream is not to turn, there is one
            sequence, or logits of the rounded model are not finite.
    """
    if "residual" not in parts:
        raise SchemeError(
            f"spin learns a rotation of the residual stream: found parts {', '.join(parts)}. Use rotate."
        )
    check_parts(model, parts)
    if len(ids_NT) < 2:
        raise SchemeError(
            f"spin learns from some sequences and judges by others: found {len(ids_NT)}. Give at least 2 "
            "(calibration.text.num_sequences and transforms.spin_sequences), or use rotate."
        )
    notes = fold_residual_(model, undo)
    others = [part for part in parts if part != "residual"]
    notes += rotate_(model, undo, seed=seed, parts=others) if others else []
    size = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    start_DD = random_rotation(size, torch.Generator().manual_seed(seed)).matrix
    num_judged = -(-len(ids_NT) // _JUDGED)
    q_DD, found = learn_rotation(
        start_DD.to(next(model.parameters()).device),
        _divergence_of(model, bits),
        ids_NT[num_judged:],
        ids_NT[:num_judged],
        num_steps=num_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
    )
    rotate_residual_(model, lambda x: x @ q_DD.to(x), undo)
    return [
        f"divergence of the model with {bits}-bit inputs and weights, on sequences not learned from: {found[0]:.4g} "
        f"nats with a random rotation, {min(found):.4g} after {num_steps} steps.",
        *notes,
    ]


def learn_rotation(
    start_DD: Tensor,
    error: Callable[[Tensor, Tensor], Tensor],
    learn: Tensor,
    judge: Tensor,
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
) -> tuple[Tensor, list[float]]:
    """Lower a function of a rotation by its gradient.

    Args:
        start_DD: where to start; orthogonal.
        error: of a rotation [D, D], float32, and of a few examples; a scalar with a gradient.
        learn, judge: examples, along the first dimension; the first give gradients, in turn, the others choose.

    Returns:
        the rotation with the lowest error on `judge`, float64, orthogonal to rounding; that error at the start, every
        5 steps and at the end.

    Raises:
        SchemeError: an error that is not finite.
    """
    q_DD = best_DD = start_DD.double()
    found: list[float] = []
    identity = torch.eye(len(q_DD), dtype=q_DD.dtype, device=q_DD.device)
    for step in range(num_steps + 1):
        if step % _EVERY == 0 or step == num_steps:
            found.append(_mean(error, q_DD, judge, batch_size))
            if found[-1] <= min(found):
                best_DD = q_DD
        if step == num_steps:
            break
        batch = learn[torch.arange(step * batch_size, (step + 1) * batch_size) % len(learn)]
        gradient_DD = _gradient(error, q_DD, batch)
        skew_DD = gradient_DD @ q_DD.T - q_DD @ gradient_DD.T
        size = float(torch.linalg.matrix_norm(skew_DD)) * (2 / len(q_DD)) ** 0.5
        if size == 0:
            break
        half_DD = skew_DD * (learning_rate * (1 - step / num_steps) / size / 2)
        q_DD = torch.linalg.solve(identity + half_DD, (identity - half_DD) @ q_DD)
    return best_DD, found


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
    """The rotation that the rounded model is in at the moment, and the width that it is rounded to."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.q_DD = torch.empty(0)

    def rows(self, x: Tensor) -> Tensor:
        """q(x Q) Q^T of vectors [..., D]."""
        q_DD = self.q_DD.to(x.dtype)
        return rounded(x @ q_DD, self.bits) @ q_DD.T


class _RoundedNorm(nn.Module):
    """A norm of the stream; what reads it gets rounded inputs."""

    def __init__(self, norm: nn.Module, turn: _Turn) -> None:
        super().__init__()
        self.norm, self.turn = norm, turn

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """[..., D]."""
        return self.turn.rows(self.norm(*args, **kwargs))


class _Reader(nn.Module):
    """A linear that reads the stream; its inputs are rounded already."""

    def __init__(self, linear: nn.Linear, turn: _Turn) -> None:
        super().__init__()
        self.linear, self.turn = linear, turn

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., O]."""
        return F.linear(x, self.turn.rows(self.linear.weight), self.linear.bias)


class _Writer(_Reader):
    """A linear that writes to the stream; its inputs are rounded as they are, behind a rotation of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., D]."""
        before = getattr(self.linear, "before", None)
        x = x if before is None else before(x)
        q_DD = self.turn.q_DD.to(self.linear.weight.dtype)
        weight_DI = q_DD @ rounded(q_DD.T @ self.linear.weight, self.turn.bits)
        return F.linear(rounded(x, self.turn.bits), weight_DI, self.linear.bias)


def _divergence_of(model: nn.Module, bits: int) -> Callable[[Tensor, Tensor], Tensor]:
    """L of a rotation [D, D] and of sequences [n, T]; the model, whose norms are folded, is as before after each."""
    turn, undo, device = _Turn(bits), Undo(), next(model.parameters()).device
    stand_ins = _stand_ins(model, turn)

    def divergence(q_DD: Tensor, ids_NT: Tensor) -> Tensor:
        wanted_RV = logits_of(model, ids_NT).flatten(0, 1).log_softmax(-1)
        turn.q_DD = q_DD
        try:
            for old, new in stand_ins:
                replace_(model, old, new, undo)
            logits_NTV = model(ids_NT.to(device), use_cache=False).logits
        finally:
            restore(undo)
        found_RV = logits_NTV.flatten(0, 1).float().log_softmax(-1)
        return F.kl_div(found_RV, wanted_RV, reduction="batchmean", log_target=True)

    return divergence


def _stand_ins(model: nn.Module, turn: _Turn) -> list[tuple[nn.Module, nn.Module]]:
    """(module, what takes its place) of every norm, reader and writer, each once; vectors that read stay."""
    edges, graph = find_edges(model, ("norm",)), graph_for(model)
    residual = graph.residual
    assert residual is not None, "callers check the parts"
    found: dict[nn.Module, nn.Module] = {}
    for edge in edges:
        norm, _ = locate(model, edge.source)
        found[norm] = _RoundedNorm(norm, turn)
        readers = [locate(model, name)[0] for name in edge.readers]
        found |= {linear: _Reader(linear, turn) for linear in readers if isinstance(linear, nn.Linear)}
    for prefix in layer_names(model, graph):
        writers = [locate(model, prefix + name)[0] for name in residual.writers]
        found |= {linear: _Writer(linear, turn) for linear in writers if isinstance(linear, nn.Linear)}
    return list(found.items())


@torch.no_grad()
def _mean(error: Callable[[Tensor, Tensor], Tensor], q_DD: Tensor, examples: Tensor, size: int) -> float:
    parts = examples.split(size)
    return sum(_finite(error(q_DD.float(), part)) * len(part) for part in parts) / len(examples)


def _gradient(error: Callable[[Tensor, Tensor], Tensor], q_DD: Tensor, examples: Tensor) -> Tensor:
    leaf = q_DD.float().requires_grad_()
    with torch.enable_grad():
        (gradient_DD,) = torch.autograd.grad(error(leaf, examples), leaf)
    return gradient_DD.double()


def _finite(error: Tensor) -> float:
    found = float(error)
    if found != found or found == float("inf"):
        raise SchemeError(f"spin needs finite logits of the rounded model: found {found}. Use rotate.")
    return found
