"""A text as consecutive blocks of token ids, [N, T]: the input of profiles and of perplexity.

The text is tokenized whole, without special tokens, and cut into blocks of `sequence_length`; what remains at the end
is dropped. N: blocks, T: tokens in a block.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantlab.config import TextConfig
from quantlab.data.documents import Convention, arranged, first_tokens
from quantlab.data.sources import digest, plain_text, read_bytes, seeded_order, shipped
from quantlab.errors import CheckpointError, DataError
from quantlab.packaged import is_packaged, packaged


@dataclass(frozen=True)
class TextBlocks:
    """Blocks of one text."""

    ids_NT: NDArray[np.int64]
    """Token ids."""
    index_N: NDArray[np.int64]
    """Where each block stands in the text: block i holds the tokens from i * T on."""
    document_N: NDArray[np.int64]
    """Number of the document that holds each block's first token, from 0."""
    sha256: str
    """Digest of the text as it is tokenized."""
    source: str
    """Name of the text."""
    convention: Convention
    """How the text became one string."""
    num_tokens: int
    """Tokens in the whole text, those outside the blocks included."""

    def facts(self) -> dict[str, str]:
        """Which text it is, for records."""
        return {"source": self.source, "text_format": self.convention, "sha256": self.sha256}


def check_text(config: TextConfig) -> str:
    """Check, without a tokenizer, that the text can be used; returns the SHA-256 of what will be tokenized.

    Raises:
        DataError: the file is missing or unreadable, is not UTF-8, holds control characters, or nothing but blanks.
    """
    return digest(_read(config)[0].encode())


def text_blocks(config: TextConfig, tokenizer: Any, *, num_embeddings: int) -> TextBlocks:
    """The blocks that the configuration asks for.

    Args:
        config: text, block length, number of blocks and how they are chosen.
        tokenizer: a Hugging Face tokenizer.
        num_embeddings: rows of the model's embedding; every id must lie below.

    Raises:
        DataError: an unusable text, or one that is too short.
        CheckpointError: the tokenizer has ids that the model has no embedding for.
    """
    text, offsets, source = _read(config)
    encoding = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids = np.asarray(encoding["input_ids"], dtype=np.int64)
    check_ids(ids, num_embeddings)
    index_N = _chosen(config, len(ids), source)
    T = config.sequence_length
    blocks_NT = ids[: len(ids) // T * T].reshape(-1, T)[index_N]
    document_N = (
        np.searchsorted(first_tokens(text, offsets, tokenizer, encoding), index_N * T, side="right") - 1
    )
    return TextBlocks(
        blocks_NT, index_N, document_N, digest(text.encode()), source, convention_of(config), len(ids)
    )


def convention_of(config: TextConfig) -> Convention:
    """What `auto` means: rows for WikiText-2, whose published perplexities are read so, the file for any other text."""
    if config.format != "auto":
        return config.format
    return "rows" if config.path is None else "file"


def check_ids(ids: NDArray[np.int64], num_embeddings: int) -> None:
    """Refuse token ids beyond the rows of the embedding."""
    highest = int(ids.max(initial=-1))
    if highest >= num_embeddings:
        raise CheckpointError(
            f"every token id must be a row of the embedding: the tokenizer gives id {highest}, the embedding has "
            f"{num_embeddings} rows. The tokenizer and the weights are not of the same model."
        )


def _read(config: TextConfig) -> tuple[str, list[int], str]:
    """The configured text as it is tokenized, where its documents begin, and its name."""
    if config.path is None:
        content, source = shipped("wiki.test.raw.xz"), "wikitext-2-raw test"
    else:
        path = packaged(config.path, DataError) if is_packaged(config.path) else Path(config.path)
        content, source = read_bytes(path), path.name
    text = plain_text(content, config.path or source)
    if not text.strip():
        raise DataError(f"text must not be empty: {config.path} holds {len(content)} bytes and no word.")
    return *arranged(text, convention_of(config)), source


def _chosen(config: TextConfig, num_tokens: int, source: str) -> NDArray[np.int64]:
    """Positions of the blocks used, ascending."""
    available = num_tokens // config.sequence_length
    wanted = available if config.num_sequences is None else config.num_sequences
    if wanted > available or available == 0:
        raise DataError(
            f"text must hold the blocks asked for: {source} has {num_tokens} tokens, which make {available} blocks of "
            f"{config.sequence_length}; {max(wanted, 1)} are asked for. Use a longer text, a smaller sequence_length "
            "or a smaller num_sequences."
        )
    order = seeded_order(available, config.seed) if config.sampling == "draw" else range(available)
    return np.array(sorted(order[:wanted]), dtype=np.int64)
