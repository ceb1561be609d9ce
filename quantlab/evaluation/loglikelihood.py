"""Log-likelihoods of continuations, in nats: float64 sums over tokens of float32 log softmax.

Shared: packed rows, each context read once (see `packing`). Unshared: every context with every continuation by itself,
batched with sequences of exactly the same length only. Neither pads, so a batch changes no score beyond the rounding
of the products.

B: sequences, T: tokens, R: rows of logits, V: vocabulary, S: scored tokens.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantlab.errors import EvaluationError
from quantlab.evaluation.encoding import Ids, Question
from quantlab.evaluation.packing import packed_masks, plan_rows

Scores = NDArray[np.float64]
Advance = Callable[[int], object]

CPU_BUDGET = 512
CUDA_BUDGET = 4096
"""Tokens in one forward pass when the batch size is `auto`."""
CPU_ROWS = 16
CUDA_ROWS = 1024
"""Rows of logits whose softmax is taken at a time; on a CPU few enough to stay in its cache."""
_POSITION_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len")


def shared_loglikelihoods(
    model: Any,
    questions: Sequence[Question],
    masks: Literal["single", "by_layer_type"],
    *,
    batch_size: int | Literal["auto"] = "auto",
    advance: Advance = lambda count: None,
) -> Scores:
    """Log-likelihood of every continuation of every question, in order, flat; contexts are shared.

    Args:
        masks: what the family takes, see `packed_masks`.
        batch_size: questions in one row; `auto` fills a budget of tokens.
        advance: told how many questions were finished, after each row.
    """
    check_model(model, max((_longest(question) for question in questions), default=0))
    sums: list[Scores] = []
    done = 0
    for row in plan_rows(questions, None if batch_size == "auto" else batch_size, token_budget(model)):
        logits_RV = forward_logits(
            model,
            row.ids_T[None],
            torch.from_numpy(row.needed_R),
            position_ids=_tensor(row.position_T[None], model),
            attention_mask=packed_masks(model, row, masks),
        )[0]
        logprob_S = token_logprobs(logits_RV, row.place_S, row.target_S)
        members = questions[done : done + row.num_questions]
        names = [question.name for question in members for _ in question.continuations]
        sums.append(finite(sums_by(row.owner_S, logprob_S), names))
        done += row.num_questions
        advance(row.num_questions)
    return np.concatenate(sums)


def unshared_loglikelihoods(
    model: Any,
    questions: Sequence[Question],
    *,
    batch_size: int | Literal["auto"] = "auto",
    advance: Advance = lambda count: None,
) -> Scores:
    """The same, with every context and continuation by itself in plain causal sequences."""
    check_model(model, max((_longest(question) for question in questions), default=0))
    sequences = [(question, ids) for question in questions for ids in question.continuations]
    owners = [place for place, question in enumerate(questions) for _ in question.continuations]
    unfinished = [len(question.continuations) for question in questions]
    scores = np.full(len(sequences), np.nan)
    for batch in _equal_lengths([len(q.context) + len(ids) - 1 for q, ids in sequences], batch_size, model):
        found = _unpadded(model, [sequences[place] for place in batch])
        scores[batch] = finite(found, [sequences[place][0].name for place in batch])
        for place in batch:
            unfinished[owners[place]] -= 1
        advance(sum(unfinished[owner] == 0 for owner in {owners[place] for place in batch}))
    return scores


def token_logprobs(logits_RV: Tensor, place_S: Ids, target_S: Ids) -> Scores:
    """log_softmax(logits_RV)[place, target] of each pair, in float32 (float64 for float64 logits).

    torch's own log_softmax, as in lm-evaluation-harness: on a CPU it is off by up to 1e-5 nats per token over
    vocabularies of 50,000, mostly to one side, and scores of both agree only because both carry that error. It sees a
    few rows at a time, which changes no bit of a row.
    """
    dtype = torch.promote_types(logits_RV.dtype, torch.float32)
    num_rows = CPU_ROWS if logits_RV.device.type == "cpu" else CUDA_ROWS
    order = np.argsort(place_S, kind="stable")
    places = place_S[order]
    place, target = (torch.from_numpy(index).to(logits_RV.device) for index in (places, target_S[order]))
    found: list[Tensor] = []
    for start in range(0, len(logits_RV), num_rows):
        first, last = np.searchsorted(places, [start, start + num_rows])
        rows = logits_RV[start : start + num_rows].to(dtype).log_softmax(-1)
        found.append(rows[place[first:last] - start, target[first:last]].double())
    result = np.empty(len(order))
    result[order] = torch.cat(found).cpu().numpy()
    return result


def sums_by(owner_S: Ids, values_S: Scores) -> Scores:
    """The sum of the values of each owner 0, 1, …, added in order."""
    return np.bincount(owner_S, weights=values_S).astype(np.float64)


@torch.no_grad()
def forward_logits(model: Any, ids_BT: Ids, keep: int | Tensor, **inputs: Any) -> Tensor:
    """Logits [B, R, V] of the model's own forward, head included, at the last `keep` places or at the places listed."""
    assert not model.training, "the model must be in eval mode"
    places = keep.to(model.device) if isinstance(keep, Tensor) else keep
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = places
    logits: Tensor = model(_tensor(ids_BT, model), use_cache=False, **inputs).logits
    if "logits_to_keep" not in inputs:
        logits = logits[:, places] if isinstance(places, Tensor) else logits[:, -places:]
    return logits


def token_budget(model: Any) -> int:
    """Tokens in one forward pass when the batch size is `auto`."""
    return CUDA_BUDGET if model.device.type == "cuda" else CPU_BUDGET


def check_model(model: Any, num_tokens: int) -> None:
    """Refuse models that are not causal, and sequences longer than their positions; nothing is ever truncated."""
    config = model.config.get_text_config()
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        raise EvaluationError(
            "a log-likelihood needs causal attention: this model's config makes it bidirectional."
        )
    limits = [limit for name in _POSITION_LIMITS if isinstance(limit := getattr(config, name, None), int)]
    if limits and num_tokens > limits[0]:
        raise EvaluationError(
            f"a sequence must fit in the model's {limits[0]} positions: the longest has {num_tokens} tokens. Use "
            "shorter documents, or a smaller sequence_length."
        )


def finite(scores: Scores, names: Sequence[str]) -> Scores:
    """The scores, if every one is a number; otherwise an error with the name of the first that is not."""
    for name, score in zip(names, scores, strict=True):
        if not np.isfinite(score):
            raise EvaluationError(
                f"a log-likelihood must be finite: {name} got {score}. The weights or the activations overflow; try "
                "dtype=float32."
            )
    return scores


def _unpadded(model: Any, sequences: Sequence[tuple[Question, Ids]]) -> Scores:
    """Log-likelihoods of continuations whose sequences have one length."""
    ids_BT = np.stack([np.concatenate([question.context, ids[:-1]]) for question, ids in sequences])
    lengths = [len(ids) for _, ids in sequences]
    keep = max(lengths)
    logits_BRV = forward_logits(model, ids_BT, keep)
    place_S = np.concatenate([np.arange(keep - n, keep) + b * keep for b, n in enumerate(lengths)])
    target_S = np.concatenate([ids for _, ids in sequences])
    logprob_S = token_logprobs(logits_BRV.flatten(0, 1), place_S, target_S)
    return sums_by(np.repeat(np.arange(len(lengths)), lengths), logprob_S)


def _equal_lengths(
    lengths: Sequence[int], batch_size: int | Literal["auto"], model: Any
) -> Iterator[list[int]]:
    """Batches of sequences of one length each, longest first; within a length the order is kept."""
    groups: dict[int, list[int]] = defaultdict(list)
    for place, length in enumerate(lengths):
        groups[length].append(place)
    for length in sorted(groups, reverse=True):
        size = max(1, token_budget(model) // length) if batch_size == "auto" else batch_size
        for start in range(0, len(groups[length]), size):
            yield groups[length][start : start + size]


def _longest(question: Question) -> int:
    """Tokens of the longest sequence that the model reads for a question."""
    return len(question.context) + max(len(ids) for ids in question.continuations) - 1


def _tensor(ids: Ids, model: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(ids)).to(model.device)
