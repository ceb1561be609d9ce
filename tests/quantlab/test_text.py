"""Texts as blocks: what is cut where, and what is refused."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quantlab.config import TextConfig
from quantlab.data.documents import Convention, arranged
from quantlab.data.sources import seeded_order, shipped
from quantlab.data.text import check_text, convention_of, text_blocks
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
    assert found.document_N.tolist() == [0] * len(found.ids_NT)


def test_the_shipped_text_is_the_official_raw_test_split() -> None:
    content = shipped("wiki.test.raw.xz")
    assert hashlib.sha256(content).hexdigest() == (
        "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
    )
    assert content.count(b"\n") == 4358 and b"\r" not in content
    as_it_is = TextConfig(sequence_length=64, num_sequences=None, format="file")
    found = text_blocks(as_it_is, toy_tokenizer(), num_embeddings=NUM_TOKENS)
    assert found.sha256 == hashlib.sha256(content).hexdigest() and found.convention == "file"
    assert toy_tokenizer().decode(found.ids_NT[0]).lstrip().startswith("= Robert Boulter =")
    assert found.document_N[0] == 0 and found.document_N.max() == 59, "it has 60 articles"


def test_rows_are_joined_by_two_newlines() -> None:
    """As `"\\n\\n".join(dataset["text"])` has it: a blank line is an empty row, others keep their newline."""
    assert arranged(" \n = A = \n \nOne .\n", "rows")[0] == "\n\n = A = \n\n\n\n\nOne .\n"
    assert arranged("a\nb", "rows")[0] == "a\n\n\nb"
    assert arranged(" \n = A = \n", "file")[0] == " \n = A = \n"


def test_the_default_of_wikitext_is_rows_and_of_a_users_text_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "one\ntwo\n")
    assert convention_of(TextConfig()) == "rows" and convention_of(TextConfig(path=path)) == "file"
    assert check_text(TextConfig(path=path)) != check_text(TextConfig(path=path, format="rows"))
    assert check_text(TextConfig()) == check_text(TextConfig(format="rows"))


@pytest.mark.parametrize("convention", ["rows", "file"])
def test_documents_begin_at_titles_of_articles(convention: Convention) -> None:
    text = " \n = First = \n \n a = b = \n \n = = Section = = \n \n x\n = no title = \n y\n \n = Second = \n \n z\n"
    arrangement, offsets = arranged(text, convention)
    assert offsets[0] == 0 and [arrangement[at:].split("\n")[0] for at in offsets[1:]] == [" = Second = "]


def test_documents_begin_behind_separators_and_blocks_know_theirs(tmp_path: Path) -> None:
    text = "<|endoftext|>".join(f"{word} " * 40 for word in ("one", "two", "three")) + "<|endoftext|>"
    assert arranged(text, "file")[1] == [0, 173, 346]
    config = TextConfig(path=written(tmp_path, text), sequence_length=8, num_sequences=None)
    found = text_blocks(config, toy_tokenizer(), num_embeddings=NUM_TOKENS)
    firsts = toy_tokenizer().convert_ids_to_tokens(found.ids_NT[:, 0].tolist())
    assert set(found.document_N) == {0, 1, 2} and (np.diff(found.document_N) >= 0).all()
    words = {0: "one", 1: "two", 2: "three"}
    for first, number in zip(firsts, found.document_N, strict=True):
        piece = first.strip("Ġ")
        assert piece in words[number] or piece == "<|endoftext|>", (piece, number)


def test_a_tokenizer_without_offsets_finds_the_same_documents(tmp_path: Path) -> None:
    class Slow:
        """The toy tokenizer, as one that is not fast."""

        is_fast = False

        def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
            return {"input_ids": toy_tokenizer()(text, **options)["input_ids"]}

    text = "<|endoftext|>".join(f"{word} " * 40 for word in ("one", "two", "three"))
    config = TextConfig(path=written(tmp_path, text), sequence_length=8, num_sequences=None)
    fast, slow = (text_blocks(config, each, num_embeddings=NUM_TOKENS) for each in (toy_tokenizer(), Slow()))
    assert (fast.ids_NT == slow.ids_NT).all() and (fast.document_N == slow.document_N).all()


@pytest.mark.parametrize("newline", ["\r\n", "\r"])
def test_newlines_of_another_system_change_nothing(newline: str, tmp_path: Path) -> None:
    text = (SENTENCE + "\n") * 20
    ours, theirs = written(tmp_path, text), written(tmp_path, text.replace("\n", newline), "other.txt")
    assert check_text(TextConfig(path=ours)) == check_text(TextConfig(path=theirs))
    assert (blocks(path=ours, sequence_length=7) == blocks(path=theirs, sequence_length=7)).all()


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
        (SENTENCE.encode("utf-16"), {}, "must be UTF-8.*begins with the mark of UTF-16"),
        (SENTENCE.encode("utf-32"), {}, "must be UTF-8.*begins with the mark of UTF-32"),
        (b"\xef\xbb\xbf" + SENTENCE.encode(), {}, r"no control characters.*U\+FEFF .* in line 1"),
        ("a\nb\x00", {}, r"no control characters.*U\+0000 \(a control character\) in line 2"),
        ("smart \x93quotes\x94", {}, r"no control characters.*U\+0093.*encoding that it was written in"),
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
