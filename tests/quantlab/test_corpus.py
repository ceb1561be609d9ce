"""Corpora: documents are split, packed and counted as `corpus.json` says, and bad text is one sentence."""

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from quantlab.cli import main
from quantlab.data.hellaswag import load_documents
from quantlab.errors import ConfigError, DataError, OutputError
from quantlab.train.config import CorpusConfig, SourceConfig
from quantlab.train.contamination import holds_any, validation_contexts
from quantlab.train.corpus import Corpus, build_corpus, open_corpus
from quantlab.train.drawing import draw
from quantlab.train.reading import documents, file_sha256
from quantlab.train.tokenizer import cut, encode
from tests.quantlab.corpora import LEAK, VALIDATION_CONTEXT, corpus_config, make_texts, write_sources

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    write_sources(folder / "sources")
    return build_corpus(corpus_config(folder))


def _source(**fields: Any) -> SourceConfig:
    return SourceConfig.model_validate({"name": "x", "file": "x.txt", "licence": "none"} | fields)


def _texts(corpus: Corpus, split: str) -> list[str]:
    """The documents of a split, decoded from its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(corpus.folder)
    return tokenizer.decode(corpus.tokens(split)).split(END)[:-1]


def test_tokens_decode_to_the_documents(corpus: Corpus) -> None:
    written = [*make_texts(0, 12, 300), *make_texts(1, 20, 80)]
    of_two_sources = ("text 0.", "text 1.")
    train = [text for text in _texts(corpus, "train") if text.startswith(of_two_sources)]
    assert len(train) > 10 and set(train) <= set(written)
    # Held-out documents may be cut, and only at their end.
    held_out = [text for text in _texts(corpus, "held_out") if text.startswith(of_two_sources)]
    assert held_out and all(any(whole.startswith(text) for whole in written) for text in held_out)


def test_the_held_out_text_has_exactly_the_held_out_tokens(corpus: Corpus) -> None:
    tokenizer = AutoTokenizer.from_pretrained(corpus.folder)
    text = (corpus.folder / "held_out.txt").read_text(encoding="utf-8")
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == corpus.tokens("held_out").tolist()


def test_the_tokenizer_adds_nothing_and_loses_nothing(corpus: Corpus) -> None:
    tokenizer = AutoTokenizer.from_pretrained(corpus.folder)
    assert len(tokenizer) == 300
    assert {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token} == {END}
    text = "  Ünïcode – tabs\tand 7 blanks \r\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and tokenizer.eos_token_id not in ids


def test_counts_and_digests_are_those_of_the_files(corpus: Corpus) -> None:
    facts = corpus.facts
    for name, digest in facts["sha256"].items():
        assert file_sha256(corpus.folder / name) == digest
    for split in ("train", "held_out"):
        ids = corpus.tokens(split)
        assert ids.dtype == np.uint16 and len(ids) == facts["tokens"][split]
        assert sum(source["tokens"][split] for source in facts["sources"]) == len(ids)
        ends = int((ids == 0).sum())
        assert sum(source["documents"][split] for source in facts["sources"]) == ends
    books, prose, lines = facts["sources"]
    assert 0 < books["tokens"]["train"] <= 3000 and books["documents"]["read"] == 12
    assert prose["documents"] | {"read": 20} == prose["documents"]  # blank documents are none
    assert prose["documents"]["train"] + prose["documents"]["held_out"] <= 20
    assert lines["documents"]["contaminated"] == 1 and lines["licence"] == "MIT"
    assert all(source["tokens"]["held_out"] <= 700 for source in facts["sources"])
    assert all(source["documents"]["held_out"] >= 1 for source in facts["sources"])


def test_no_family_is_on_both_sides(corpus: Corpus) -> None:
    train, held_out = ({text[:20] for text in _texts(corpus, split)} for split in ("train", "held_out"))
    assert not train & held_out
    assert not any(LEAK in text for text in (*_texts(corpus, "train"), *_texts(corpus, "held_out")))


def test_the_same_settings_make_the_same_bytes(corpus: Corpus, tmp_path: Path) -> None:
    write_sources(tmp_path / "sources")
    again = build_corpus(corpus_config(tmp_path))
    assert again.facts == corpus.facts
    assert (again.folder / "corpus.json").read_bytes() == (corpus.folder / "corpus.json").read_bytes()


def test_a_documents_side_does_not_depend_on_the_others() -> None:
    config = CorpusConfig.model_construct(seed=0, held_out_fraction=0.3)
    texts = make_texts(5, 40, 10)

    def held_out(chosen: list[str]) -> set[str]:
        drawn = draw(chosen, config, _source(), lambda text: False)
        return {chosen[document.position] for document in drawn.held_out}

    assert held_out(texts[::-1]) == held_out(texts)
    assert held_out(texts[:20]) == held_out(texts) & set(texts[:20])
    assert 4 < len(held_out(texts)) < 20


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_either_side_of_a_split_has_a_document(fraction: float) -> None:
    config = CorpusConfig.model_construct(seed=0, held_out_fraction=fraction)
    drawn = draw(make_texts(5, 8, 3), config, _source(), lambda text: False)
    assert len(drawn.held_out) == (1 if fraction < 0.5 else 7) and len(drawn.train) == 8 - len(drawn.held_out)
    alone = draw(["one"], config, _source(), lambda text: False)
    assert len(alone.train) == 1 and not alone.held_out


def test_every_validation_context_is_found_wherever_it_stands() -> None:
    holds = validation_contexts()
    for document in load_documents()[::97]:
        assert holds(document.query + document.endings[0])
        assert holds(f"Before: it stands other text. {document.query} and after.")
    assert not holds(VALIDATION_CONTEXT.removesuffix("He") + "Something else follows.")
    assert not holds_any([VALIDATION_CONTEXT])(VALIDATION_CONTEXT.replace("Roof", "Wall"))


@pytest.mark.parametrize("size", [1, 3, 1 << 20])
def test_documents_are_the_same_whatever_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr("quantlab.train.reading._CHUNK", size)
    (tmp_path / "x.txt").write_text(
        "één<|endoftext|>\n zwei 二 \n<|endoftext|><|endoftext|>last", encoding="utf-8"
    )
    assert list(documents(tmp_path / "x.txt", _source())) == ["één", "zwei 二", "", "last"]
    assert list(documents(tmp_path / "x.txt", _source(documents="line")))[1] == "zwei 二"
    assert len(list(documents(tmp_path / "x.txt", _source(documents="file")))) == 1


@pytest.mark.parametrize("size", [2, 3, 1 << 20])
def test_a_byte_that_is_not_utf8_is_named_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr("quantlab.train.reading._CHUNK", size)
    (tmp_path / "x.txt").write_bytes("二é".encode() + b"\xff")
    with pytest.raises(DataError, match=r"x\.txt has byte 0xff at offset 5\."):
        list(documents(tmp_path / "x.txt", _source()))


def test_a_corpus_is_opened_where_it_exists_and_other_settings_are_refused(corpus: Corpus) -> None:
    config = corpus_config(corpus.folder.parent, folder="absent")
    assert open_corpus(config).facts == corpus.facts
    before = (corpus.folder / "corpus.json").stat().st_mtime_ns
    with pytest.raises(ConfigError, match=r"was made with seed = 0, not 1\. Choose another corpus\.out"):
        open_corpus(config.model_copy(update={"seed": 1}))
    assert (corpus.folder / "corpus.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("content", "name", "changes", "error", "sentence"),
    [
        (None, "x.txt", {}, DataError, r"must exist: .*x\.txt does not\. Set corpus\.folder"),
        (b"", "x.txt", {}, DataError, "must not be empty: source 'x'"),
        (b" \n<|endoftext|>\n", "x.txt", {}, DataError, "must not be empty"),
        (b"abc\xff", "x.txt", {}, DataError, r"must be UTF-8: .* byte 0xff at offset 3\."),
        (b"abc\xe2\x82", "x.txt", {}, DataError, "must be UTF-8: .* byte 0xe2 at offset 3"),
        (lzma.compress(b"abc" * 999)[:-30], "x.txt.xz", {}, DataError, "must be readable: .*x.txt.xz"),
        (b"not zstandard", "x.txt.zst", {}, DataError, "must be readable: .*x.txt.zst"),
        (b"abc", "x.doc", {}, ConfigError, r"must end in \.txt, \.txt\.xz or \.txt\.zst"),
        (b"abc", "x.txt", {}, DataError, "long enough for the tokenizer: it makes 259 entries of 300"),
        (b"a<|endoftext|>b" * 3, "x.txt", {"vocab_size": 257}, None, ""),
        (b"ab", "x.txt", {"vocab_size": 257}, DataError, "held-out split must hold a document"),
    ],
)
def test_bad_text_is_one_sentence_and_nothing_is_left(
    tmp_path: Path,
    content: bytes | None,
    name: str,
    changes: dict[str, Any],
    error: type[Exception] | None,
    sentence: str,
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    source = {"name": "x", "file": name, "licence": "none"}
    config = corpus_config(tmp_path, folder=tmp_path, sources=[source], **changes)
    if error is None:
        assert open_corpus(config).facts["tokens"]["held_out"] > 0
        return
    with pytest.raises(error, match=sentence):
        open_corpus(config)
    assert [path.name for path in tmp_path.iterdir()] == ([] if content is None else [name])


def test_a_budget_below_one_document_and_a_foreign_folder_are_refused(tmp_path: Path) -> None:
    write_sources(tmp_path / "sources")
    tree = corpus_config(tmp_path).model_dump(mode="json")
    tree["sources"][0]["max_tokens"] = 50
    with pytest.raises(
        DataError, match="max_tokens must hold a whole document: source 'books' has max_tokens=50"
    ):
        build_corpus(CorpusConfig.model_validate(tree))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "mine.txt").write_text("precious")
    with pytest.raises(DataError, match=r"must hold a readable corpus\.json"):
        open_corpus(corpus_config(tmp_path))
    with pytest.raises(OutputError, match="output folder exists"):
        build_corpus(corpus_config(tmp_path))
    assert (tmp_path / "corpus" / "mine.txt").read_text() == "precious"


def test_the_command_makes_a_corpus_and_tells_its_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sources(tmp_path / "sources")
    tree = {
        "corpus": corpus_config(tmp_path).model_dump(mode="json"),
        "model": {
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 96,
        },
        "variants": ["standard"],
        "schedule": {"tokens": 512, "sequence_length": 32, "batch_size": 2},
    }
    path = tmp_path / "train.yaml"
    path.write_text(json.dumps(tree))
    with pytest.raises(SystemExit) as end:
        main(["corpus", str(path), "--json"])
    assert end.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tokens"]["train"] == len(np.load(tmp_path / "corpus" / "train.npy"))
    with pytest.raises(SystemExit) as end:
        main(["corpus", str(path), "--set", "corpus.sead=1"])
    assert end.value.code == 2
    assert "unknown key 'corpus.sead'" in (told := capsys.readouterr().err) and "'seed'" in told


@pytest.mark.parametrize("spare", [-1, 0, 1])
def test_a_beginning_has_at_most_so_many_tokens(corpus: Corpus, spare: int) -> None:
    tokenizer, text = Tokenizer.from_file(str(corpus.folder / "tokenizer.json")), "one two three\nfour five"
    count = len(encode(tokenizer, text, np.int64))
    found = cut(tokenizer, text, count + spare)
    assert len(encode(tokenizer, found, np.int64)) <= count + spare and text.startswith(found)
    assert (found == text) == (spare >= 0)
