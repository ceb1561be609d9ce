"""Contexts and continuations as token ids, split exactly as lm-evaluation-harness 0.4.13 splits them.

The context is encoded without its trailing blanks, then context and continuation together; the continuation is what
the whole encoding has beyond the length of the context's. Where tokens merge across the boundary, the model therefore
reads the context's own tokens followed by the tail of the whole encoding, and so the context is the same for every
continuation of it.

Source: lm-evaluation-harness 0.4.13, lm_eval/api/model.py, `_encode_pair`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantlab.data.hellaswag import Document
from quantlab.data.text import check_ids
from quantlab.errors import EvaluationError
from quantlab.evaluation.bos import Bos

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Question:
    """A context and its continuations, as token ids."""

    name: str
    """Who it is, for errors."""
    context: Ids
    """At least one id."""
    continuations: tuple[Ids, ...]
    """At least one id each; all of them are scored."""


def encode_documents(
    tokenizer: Any, documents: Sequence[Document], bos: Bos, *, num_embeddings: int
) -> list[Question]:
    """The documents' questions: each ending is scored after the query and one space.

    Raises:
        EvaluationError: a second BOS token, or a context or ending that has no token of its own.
        CheckpointError: the tokenizer has ids that the model has no embedding for.
    """
    contexts = [document.query.rstrip() for document in documents]
    wholes = [f"{document.query} {ending}" for document in documents for ending in document.endings]
    for document in documents:
        bos.check(document.query, f"document {document.position}")
    ids = _encode(tokenizer, contexts + wholes, bos)
    check_ids(np.array([max(row, default=-1) for row in ids], dtype=np.int64), num_embeddings)
    tails = iter(ids[len(contexts) :])
    questions = []
    for document, context in zip(documents, ids, strict=False):
        continuations = tuple(_array(next(tails)[len(context) :]) for _ in document.endings)
        questions.append(Question(f"document {document.position}", _array(context), continuations))
    _check_lengths(questions)
    return questions


def _encode(tokenizer: Any, texts: Sequence[str], bos: Bos) -> list[list[int]]:
    """Ids of every text, with the BOS policy applied; one call, which uses every core it is given."""
    encoding = tokenizer(
        list(texts), add_special_tokens=bos.automatic, return_attention_mask=False, verbose=False
    )
    return [[*bos.forced, *row] for row in encoding["input_ids"]]


def _check_lengths(questions: Sequence[Question]) -> None:
    for question in questions:
        if not len(question.context) or not all(len(ids) for ids in question.continuations):
            raise EvaluationError(
                f"a context and each of its endings must have a token of its own: {question.name} has "
                f"{len(question.context)} context tokens and {[len(ids) for ids in question.continuations]} ending "
                "tokens. Leave the document out, or use another tokenizer."
            )


def _array(ids: Sequence[int]) -> Ids:
    return np.array(ids, dtype=np.int64)
