"""Packed rows: every context once, its continuations as branches beside each other, several questions in one row.

    ids        context context | one one   | two | context context context | …
    position   0       1       | 2   3     | 2   | 0       1       2       | …
    branch     0       0       | 1   1     | 2   | 0       0       0       | …

A token sees the tokens of its own question that are in the context or in its own branch and not after it, within the
layer's own window, all by position ids; so each branch is read as if it stood alone after the context. The last token
of a continuation is only ever predicted, never read, and is left out.

T: tokens in a row, R: rows of logits that are needed, S: scored tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantlab.errors import EvaluationError
from quantlab.evaluation.encoding import Ids, Question

Masks = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class PackedRow:
    """One row of a forward pass and where its scores are read."""

    ids_T: Ids
    position_T: Ids
    question_T: Ids
    """Which question of the row a token belongs to."""
    branch_T: Ids
    """0 in the context, e + 1 in continuation e."""
    needed_R: Ids
    """Places whose logits are needed, ascending."""
    place_S: Ids
    """Index into `needed_R` of the place that predicts each scored token."""
    target_S: Ids
    """Id of each scored token."""
    owner_S: Ids
    """Continuation that a scored token belongs to, counted through all continuations of the row."""
    num_questions: int


def plan_rows(questions: Sequence[Question], batch_size: int | None, budget: int) -> Iterator[PackedRow]:
    """Rows that hold the questions in order: `batch_size` of them each, or as many as `budget` tokens hold."""
    taken: list[Question] = []
    num_tokens = 0
    for question in questions:
        full = len(taken) == batch_size if batch_size else num_tokens + packed_length(question) > budget
        if taken and full:
            yield pack(taken)
            taken, num_tokens = [], 0
        taken.append(question)
        num_tokens += packed_length(question)
    if taken:
        yield pack(taken)


def packed_length(question: Question) -> int:
    """Tokens that a question takes in a row."""
    return len(question.context) + sum(len(ids) - 1 for ids in question.continuations)


def pack(questions: Sequence[Question]) -> PackedRow:
    """The questions, side by side in one row."""
    tokens: list[tuple[Ids, Ids, Ids, Ids]] = []
    scores: list[tuple[Ids, Ids, Ids]] = []
    start = owner = 0
    for place, question in enumerate(questions):
        num_context = len(question.context)
        last = start + num_context - 1
        tokens.append(_segment(question.context, 0, place, 0))
        start += num_context
        for branch, ids in enumerate(question.continuations, start=1):
            tokens.append(_segment(ids[:-1], num_context, place, branch))
            predictors = np.concatenate([[last], np.arange(start, start + len(ids) - 1)])
            scores.append((predictors, ids, np.full(len(ids), owner)))
            start += len(ids) - 1
            owner += 1
    ids_T, position_T, question_T, branch_T = (np.concatenate(parts) for parts in zip(*tokens, strict=True))
    predictor_S, target_S, owner_S = (np.concatenate(parts) for parts in zip(*scores, strict=True))
    needed_R, place_S = np.unique(predictor_S, return_inverse=True)
    return PackedRow(
        ids_T, position_T, question_T, branch_T, needed_R, place_S, target_S, owner_S, len(questions)
    )


def packed_masks(model: Any, row: PackedRow, kind: Literal["single", "by_layer_type"]) -> Masks:
    """The row's attention mask as the model takes it, [1, 1, T, T], or one such mask for each type of layer.

    Args:
        model: a Hugging Face causal LM.
        row: the packed row.
        kind: what the family's forward takes; `by_layer_type` is a dict keyed by the names in `config.layer_types`.

    Raises:
        EvaluationError: a layer type or an attention implementation that cannot follow such a mask.
    """
    config = model.config.get_text_config()
    implementation = str(model.config._attn_implementation)
    if implementation.startswith(("flash", "flex", "paged")):
        raise EvaluationError(
            f"packed rows need an attention implementation that takes a mask of any shape: the model was loaded with "
            f"{implementation!r}. Load it with 'sdpa'."
        )
    additive = model.dtype if implementation == "eager" else None
    window = getattr(config, "sliding_window", None)
    if kind == "single":
        return _mask(row, window, model.device, additive)
    windows = {"full_attention": None, "sliding_attention": window}
    if unknown := set(config.layer_types) - set(windows):
        raise EvaluationError(
            f"packed rows need layers of full or sliding attention: this model has {', '.join(sorted(unknown))}. "
            "Its family must not be declared packable."
        )
    return {
        name: _mask(row, windows[name], model.device, additive) for name in sorted(set(config.layer_types))
    }


def visible(row: PackedRow, window: int | None) -> NDArray[np.bool_]:
    """Which keys each query sees, [T, T]; a window of w shows a query itself and the w - 1 positions before it."""
    distance = row.position_T[:, None] - row.position_T[None, :]
    same_question = row.question_T[:, None] == row.question_T[None, :]
    same_branch = (row.branch_T[None, :] == 0) | (row.branch_T[:, None] == row.branch_T[None, :])
    seen: NDArray[np.bool_] = same_question & same_branch & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def _mask(row: PackedRow, window: int | None, device: torch.device, additive: torch.dtype | None) -> Tensor:
    """Boolean, True where visible; or in the dtype `additive`, 0 where visible and its lowest number elsewhere."""
    seen = torch.from_numpy(visible(row, window)).to(device)[None, None]
    if additive is None:
        return seen
    return torch.zeros(seen.shape, dtype=additive, device=device).masked_fill_(
        ~seen, torch.finfo(additive).min
    )


def _segment(ids: Ids, position: int, question: int, branch: int) -> tuple[Ids, Ids, Ids, Ids]:
    """Ids, positions, question and branch of consecutive tokens."""
    count = len(ids)
    places = np.arange(position, position + count)
    return ids, places, np.full(count, question), np.full(count, branch)
