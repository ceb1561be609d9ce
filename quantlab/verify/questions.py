"""What a reader is asked: rows of HellaSwag to score and rows of tokens to show its logits for, encoded by us.

Every context with every ending is a row of its own, unpadded, so that every engine sees the same tokens.
N documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantlab.data.hellaswag import Document, load_hellaswag, select
from quantlab.evaluation.bos import resolve_bos
from quantlab.evaluation.encoding import encode_documents
from quantlab.verify.config import VerifyConfig

__all__ = ["Request", "make_request"]


@dataclass(frozen=True)
class Request:
    """Rows of tokens, and the documents that they come from."""

    documents: tuple[Document, ...]
    dataset_sha256: str
    rows: tuple[NDArray[np.int64], ...]
    """Four for each document."""
    starts: tuple[int, ...]
    """Place in each row at which its ending begins."""
    probes: tuple[NDArray[np.int64], ...]

    def arrays(self) -> dict[str, NDArray[np.int64]]:
        """The request as `worker` reads it."""
        return {
            "row_ids": np.concatenate(self.rows),
            "row_lengths": np.array([len(row) for row in self.rows], dtype=np.int64),
            "row_starts": np.array(self.starts, dtype=np.int64),
            "probe_ids": np.concatenate(self.probes),
            "probe_lengths": np.array([len(row) for row in self.probes], dtype=np.int64),
        }

    def save(self, path: Path) -> None:
        """Write it for a worker."""
        arrays: dict[str, Any] = self.arrays()
        np.savez(path, **arrays)


def make_request(tokenizer: Any, config: VerifyConfig, num_embeddings: int) -> Request:
    """Rows of the documents that the configuration asks for; the probes are the beginnings of the first of them.

    Raises:
        DataError: an unusable file or selection of documents.
        EvaluationError: tokenizer and documents do not fit together.
        CheckpointError: the tokenizer has ids that the model has no embedding for.
    """
    dataset = load_hellaswag(config.hellaswag.path)
    documents = select(dataset.documents, config.hellaswag)
    policy = resolve_bos(tokenizer, "auto")
    questions = encode_documents(tokenizer, documents, policy, num_embeddings=num_embeddings)
    pairs = [(question.context, ids) for question in questions for ids in question.continuations]
    rows = tuple(np.concatenate(pair) for pair in pairs)
    # One of each document: endings of one document begin alike.
    probes = _beginnings(rows[::4][: config.num_probes], config.probe_tokens)
    return Request(
        tuple(documents), dataset.sha256, rows, tuple(len(context) for context, _ in pairs), probes
    )


def _beginnings(rows: Sequence[NDArray[np.int64]], length: int) -> tuple[NDArray[np.int64], ...]:
    return tuple(row[:length] for row in rows)
