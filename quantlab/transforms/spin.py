"""Spin: a rotation of the residual stream that is learned, from where `rotate` starts.

    E(Q) = mean |x Q - q(x Q)|^2 / |x|^2 over inputs x of linears + the same over rows w of their matrices

q rounds a vector to symmetric integers of a few bits with one scale, absmax / (2^(b - 1) - 1). Inputs are what the
norms of the residual stream give for calibration tokens, rows are those of the matrices that read them; both are
samples. Half of them give the gradient, that of E itself with codes held; the other half judges. Steps stay orthogonal
by Cayley's transform, and the Q with the lowest E on the judging half is kept, so that E is never above that of the
random Hadamard rotation it starts from.

    A = G Q^T - Q G^T,  Q' = (I + t A / 2)^-1 (I - t A / 2) Q,  t |A|_2 about `learning_rate`, falling to 0

What it is not: SpinQuant lowers the loss of the quantized network by end-to-end gradients; E is a stand-in that needs
one forward pass. Nothing says that a lower E is a lower perplexity. Source: SpinQuant, arXiv:2405.16406, section
3; Cayley SGD, Li et al. 2020, arXiv:2002.01113.

Letters: N sampled vectors, D hidden channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from probes.hooks import watch
from quantlab.errors import SchemeError
from quantlab.transforms.edges import find_edges
from quantlab.transforms.edit import Undo, locate, matrix_of
from quantlab.transforms.guard import logits_of
from quantlab.transforms.hadamard import random_rotation
from quantlab.transforms.rotate import PARTS, check_parts, fold_residual_, rotate_

__all__ = ["learn_rotation", "rounding_error", "spin_"]


def spin_(
    model: nn.Module,
    ids_NT: Tensor,
    undo: Undo,
    *,
    seed: int = 0,
    parts: Sequence[str] = PARTS,
    bits: int = 4,
    num_steps: int = 30,
    num_vectors: int = 8192,
    learning_rate: float = 0.03,
) -> list[str]:
    """Rotate as `rotate_` does, with a learned rotation of the residual stream.

    Args:
        ids_NT: calibration tokens.
        num_vectors: sampled inputs, and sampled rows.

    Returns:
        the error before and after learning, in a sentence, and what `rotate_` says.

    Raises:
        SchemeError: the architecture does not declare a part, or its residual stream is not to turn.
    """
    if "residual" not in parts:
        raise SchemeError(
            f"spin learns a rotation of the residual stream: found parts {', '.join(parts)}. Use rotate."
        )
    check_parts(model, parts)
    notes = fold_residual_(model, undo)
    generator = torch.Generator().manual_seed(seed)
    drawn = (_inputs(model, ids_NT, num_vectors, generator), _rows(model, num_vectors, generator))
    learn, judge = [x[::2] for x in drawn], [x[1::2] for x in drawn]
    start = random_rotation(drawn[0].shape[1], torch.Generator().manual_seed(seed)).matrix.to(drawn[0].device)
    q_DD, errors = learn_rotation(
        start, learn, judge, bits=bits, num_steps=num_steps, learning_rate=learning_rate
    )
    notes.append(
        f"relative error of {bits}-bit inputs and weights at the residual stream, on vectors not learned from: "
        f"{errors[0]:.4g} with a random rotation, {min(errors):.4g} after {num_steps} steps."
    )
    return notes + rotate_(model, undo, seed=seed, parts=parts, turn=lambda x: x @ q_DD.to(x))


def learn_rotation(
    start_DD: Tensor,
    learn: Sequence[Tensor],
    judge: Sequence[Tensor],
    *,
    bits: int,
    num_steps: int,
    learning_rate: float,
) -> tuple[Tensor, list[float]]:
    """Lower the sum of `rounding_error` over groups of vectors [N, D], by the gradient of `learn`.

    Returns:
        the rotation with the lowest error on `judge`, float64, orthogonal to rounding; that error at the start and
        after each step.
    """
    q_DD = best_DD = start_DD.double()
    errors: list[float] = []
    identity = torch.eye(len(q_DD), dtype=q_DD.dtype, device=q_DD.device)
    for step in range(num_steps + 1):
        errors.append(float(_error(q_DD.float(), judge, bits)))
        if errors[-1] < min(errors[:-1], default=torch.inf):
            best_DD = q_DD
        if step == num_steps:
            break
        gradient_DD = _gradient(q_DD, learn, bits)
        skew_DD = gradient_DD @ q_DD.T - q_DD @ gradient_DD.T
        size = float(torch.linalg.matrix_norm(skew_DD)) * (2 / len(q_DD)) ** 0.5
        if size == 0:
            break
        half_DD = skew_DD * (learning_rate * (1 - step / num_steps) / size / 2)
        q_DD = torch.linalg.solve(identity + half_DD, (identity - half_DD) @ q_DD)
    return best_DD, errors


def rounding_error(x_ND: Tensor, bits: int) -> Tensor:
    """Mean over vectors of |x - q(x)|^2 / |x|^2; vectors of zeros count 0. Differentiable, codes held."""
    qmax = 2 ** (bits - 1) - 1
    scale_N1 = (x_ND.abs().amax(-1, keepdim=True) / qmax).clamp(min=torch.finfo(x_ND.dtype).tiny)
    codes_ND = torch.round(x_ND / scale_N1).detach()
    lost_N = (x_ND - scale_N1 * codes_ND).square().sum(-1)
    error: Tensor = (lost_N / x_ND.square().sum(-1).clamp(min=torch.finfo(x_ND.dtype).tiny)).mean()
    return error


def _error(q_DD: Tensor, vectors: Sequence[Tensor], bits: int) -> Tensor:
    return torch.stack([rounding_error(x_ND @ q_DD, bits) for x_ND in vectors]).sum()


def _gradient(q_DD: Tensor, vectors: Sequence[Tensor], bits: int) -> Tensor:
    turned = q_DD.float().requires_grad_()
    with torch.enable_grad():
        (gradient_DD,) = torch.autograd.grad(_error(turned, vectors, bits), turned)
    return gradient_DD.double()


def _inputs(model: nn.Module, ids_NT: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """What the norms of the residual stream give, [N, D], float32: as many vectors of each, drawn at random."""
    names = [edge.source for edge in find_edges(model, ("norm",))]
    each = -(-count // (len(names) * len(ids_NT)))
    seen: list[Tensor] = []

    def see(name: str, module: nn.Module, args: object, output: Tensor) -> None:
        flat = output.detach().flatten(0, -2)
        index = torch.randperm(len(flat), generator=generator)[:each]
        seen.append(flat[index.to(flat.device)].float())

    with watch(model, names, see):
        for row in ids_NT:
            logits_of(model, row[None])
    return torch.cat(seen)


def _rows(model: nn.Module, count: int, generator: torch.Generator) -> Tensor:
    """Rows of the matrices that read the residual stream, [N, D], float32: as many of each, drawn at random."""
    readers = [name for edge in find_edges(model, ("norm",)) for name in edge.readers]
    each = -(-count // len(readers))
    rows = []
    for name in readers:
        matrix_OI = matrix_of(*locate(model, name))
        index = torch.randperm(len(matrix_OI), generator=generator)[:each]
        rows.append(matrix_OI[index.to(matrix_OI.device)].float())
    return torch.cat(rows)
