"""Texts as blocks: what is cut where, and what is refused."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quantlab.config import TextConfig
from quantlab.data.sources import seeded_order
from quantlab.data.text import check_text, text_blocks
from quantlab.errors import CheckpointError, DataError
from tests.toys import NUM_TOKENS, toy_tokenizer

SENTENCE = "The quick brown fox jumps over the lazy dog. "


def written(folder: Path, content: str | bytes, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def blocks(**config: object) -> np.ndarray:
    found = text_blocks(TextConfig.model_validate(config), toy_tokenizer(), num_embeddings=NUM_TOKENS)
    return found.ids_NT


def test_blocks_are_consecutive_pieces_of_the_whole_text(tmp_path: Path) -> None:
    path = written(tmp_path, SENTENCE * 20)
    ids = toy_tokenizer()(SENTENCE * 20, add_special_tokens=False)["input_ids"]
    found = text_blocks(
        TextConfig(path=path, sequence_length=7, num_sequences=None),
        toy_tokenizer(),
        num_embeddings=NUM_TOKENS,
    )
    assert found.ids_NT.shape == (len(ids) // 7, 7) and found.ids_NT.dtype == np.int64
    assert found.ids_NT.flatten().tolist() == ids[: len(ids) // 7 * 7]
    assert found.num_tokens == len(ids) and found.source == "text.txt"
    assert found.sha256 == check_text(TextConfig(path=path)) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_shipped_text_is_the_raw_test_split_without_blank_lines() -> None:
    found = text_blocks(
        TextConfig(sequence_length=64, num_sequences=2), toy_tokenizer(), num_embeddings=NUM_TOKENS
    )
    assert found.sha256 == "4f3e427e4aff23acff917a8a51aeae21bf12832256e26914c8fc250dcef4103c"
    assert found.ids_NT.shape == (2, 64) and found.index_N.tolist() == [0, 1]
    assert toy_tokenizer().decode(found.ids_NT[0]).startswith(" = Robert Boulter =")


def test_a_draw_takes_blocks_of_the_text_that_only_the_seed_decides(tmp_path: Path) -> None:
    path = written(tmp_path, " ".join(str(number) for number in range(3000)))
    text = {"path": path, "sequence_length": 16}
    every = blocks(**text, num_sequences=None)
    draws = [
        text_blocks(
            TextConfig(**text, num_sequences=5, sampling="draw", seed=seed),
            toy_tokenizer(),
            num_embeddings=NUM_TOKENS,
        )
        for seed in (0, 0, 1)
    ]
    assert draws[0].index_N.tolist() == draws[1].index_N.tolist() != draws[2].index_N.tolist()
    assert (np.diff(draws[0].index_N) > 0).all() and draws[0].index_N.tolist() != [0, 1, 2, 3, 4]
    assert (draws[0].ids_NT == every[draws[0].index_N]).all()


def test_the_seeded_order_never_changes() -> None:
    """Its first places, written down once: a record made with one version is found by every later one."""
    assert seeded_order(10, 0) == [7, 4, 9, 3, 8, 2, 6, 0, 5, 1]
    assert sorted(seeded_order(1000, 3)) == list(range(1000))


@pytest.mark.parametrize(
    ("content", "config", "message"),
    [
        ("", {}, "must not be empty"),
        (" \n\t\n", {}, "must not be empty.*holds 4 bytes"),
        (b"caf\xe9", {}, "must be UTF-8.*0xe9 at offset 3"),
        (SENTENCE, {"sequence_length": 512, "num_sequences": 1}, "make 0 blocks of 512; 1 are asked for"),
        (SENTENCE, {"sequence_length": 512, "num_sequences": None}, "make 0 blocks of 512; 1 are asked for"),
        (SENTENCE * 4, {"sequence_length": 8, "num_sequences": 99}, "make 1. blocks of 8; 99 are asked for"),
    ],
)
def test_unusable_texts_are_refused(
    tmp_path: Path, content: str | bytes, config: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        blocks(path=written(tmp_path, content), **config)


@pytest.mark.parametrize(("name", "message"), [("missing.txt", "must exist"), (".", "must be readable")])
def test_texts_that_cannot_be_read_are_refused_before_anything_is_loaded(
    tmp_path: Path, name: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        check_text(TextConfig(path=tmp_path / name))


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must be readable"):
        check_text(TextConfig(path=written(tmp_path, b"not xz", "text.txt.xz")))


def test_an_id_beyond_the_embedding_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"gives id \d+, the embedding has 300 rows"):
        text_blocks(TextConfig(sequence_length=8, num_sequences=1), toy_tokenizer(), num_embeddings=300)


def test_data_needs_no_torch() -> None:
    script = "import quantlab.data.text, quantlab.data.hellaswag, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
