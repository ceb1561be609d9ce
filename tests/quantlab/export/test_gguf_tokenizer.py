"""Tokenizers of GGUF files: llama.cpp cuts and merges any text to the ids of the tokenizer that was written."""

import json
import lzma
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from quantlab.errors import SchemeError
from quantlab.export.gguf_file import Value, key_bytes, write_file
from quantlab.export.gguf_tokenizer import tokenizer_keys
from quantlab.inspection.gguf_header import read_gguf
from quantlab.inspection.gguf_pretokenizers import PRE_NAMES, pre_name
from quantlab.models.loading import load_tokenizer
from tests.llama import opened
from tests.toys import toy_tokenizer

WIKI = lzma.decompress((files("quantlab") / "data/files/wiki.test.raw.xz").read_bytes()).decode("utf-8")
ODD = (
    "Hello  world!! I'm 12345 y'all'LL, naïve café\n\n\t  tabs \r\nand 数学汉字がな한국어 ½ ² Ⅷ ٣٤ 😀👩‍👩‍👧 "
    ",,.. (x+y)=z; foo_bar  $100.00 #tag\n   \n end  \u00a0nbsp हिन्दी ไทย  "
)
INFO = cast(Any, SimpleNamespace(kind="huggingface"))
END = "<|endoftext|>"


def byte_level(pieces: tuple[str, ...], *, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of 1,500 tokens that cuts as an entry of PRE_NAMES says."""
    steps: list[Any] = []
    for piece in pieces:
        if piece == "ByteLevel":
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
        elif piece == r"\p{N}":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            steps.append(pre_tokenizers.Split(Regex(piece), "isolated"))
    if pieces[-1] != "ByteLevel":
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    # Learned from whole words with their digits and signs, so that it shows where text is cut.
    words = pre_tokenizers.Split(Regex(r"\s*\S+"), "isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([WIKI[:50_000], ODD * 20], trainer)
    spec = json.loads(tokenizer.to_str())
    # Tokens without a merge, which only `ignore_merges` finds.
    del spec["model"]["merges"][400::7]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def sentencepiece(*, prefix: str = "legacy", drop_merges: int = 0) -> PreTrainedTokenizerFast:
    """BPE over characters with bytes for the unknown, as a converted SentencePiece model of 900 learned tokens is."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator([WIKI[:100_000]], trainers.BpeTrainer(vocab_size=900, show_progress=False))
    learned = sorted(learner.get_vocab(), key=learner.get_vocab().__getitem__)
    texts = dict.fromkeys(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned])
    vocab = {text: row for row, text in enumerate(texts)}
    splits = [(text[:at], text[at:]) for text in learned for at in range(1, len(text))]
    merges = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            merges[: len(merges) - drop_merges],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    if prefix == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write(path: Path, tokenizer: PreTrainedTokenizerFast, num_tokens: int) -> Path:
    """A file of a tokenizer alone, with the sizes that llama.cpp asks for."""
    sizes: dict[str, Value] = {
        "general.architecture": "llama",
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    for key in ("embedding_length", "feed_forward_length", "context_length"):
        sizes[f"llama.{key}"] = 1024
    for key in ("block_count", "attention.head_count"):
        sizes[f"llama.{key}"] = 1
    keys = [key_bytes(key, value) for key, value in sizes.items()]
    write_file(path, [*keys, *tokenizer_keys(tokenizer, INFO, num_tokens)], [])
    return path


def check_same(path: Path, tokenizer: PreTrainedTokenizerFast, texts: tuple[str, ...]) -> None:
    with opened(path, vocab_only=True, logits_all=False) as llama:
        for text in texts:
            assert llama.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(("pieces", "ignore_merges"), PRE_NAMES, ids=PRE_NAMES.values())
def test_llama_cpp_cuts_and_merges_as_the_tokenizer_does(
    tmp_path: Path, pieces: tuple[str, ...], ignore_merges: bool
) -> None:
    tokenizer = byte_level(pieces, ignore_merges=ignore_merges)
    path = write(tmp_path / "vocab.gguf", tokenizer, 1500)
    assert read_gguf(path).metadata["tokenizer.ggml.pre"] == PRE_NAMES[pieces, ignore_merges]
    check_same(path, tokenizer, (ODD, WIKI[300_000:320_000], f"a{END} b", ""))


@pytest.mark.parametrize(("pieces", "ignore_merges"), PRE_NAMES, ids=PRE_NAMES.values())
def test_a_file_is_loaded_with_the_cut_that_it_names(
    tmp_path: Path, pieces: tuple[str, ...], ignore_merges: bool
) -> None:
    """transformers cuts by GPT-2's expression whatever the file says."""
    tokenizer = byte_level(pieces, ignore_merges=ignore_merges)
    path = write(tmp_path / "vocab.gguf", tokenizer, 1500)
    loaded = load_tokenizer(cast(Any, SimpleNamespace(kind="gguf", path=path)), trusted=False)
    for text in (ODD, WIKI[300_000:320_000], "died 4 ½ months\n\n\n 1st 12345"):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("prefix", ["legacy", "always", "never"])
def test_llama_cpp_merges_characters_as_the_tokenizer_does(tmp_path: Path, prefix: str) -> None:
    tokenizer = sentencepiece(prefix=prefix)
    path = write(tmp_path / "vocab.gguf", tokenizer, len(tokenizer) + 3)
    metadata = read_gguf(path).metadata
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is (prefix != "never")
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.unknown_token_id"]) == (1, 0)
    # Before a text that begins with a space, "always" adds none and llama.cpp does.
    check_same(path, tokenizer, (ODD, WIKI[300_000:320_000].lstrip()))


def test_rows_without_a_token_are_unused_and_added_ones_keep_their_kind(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    tokenizer = byte_level(("ByteLevel",))
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    path = write(tmp_path / "vocab.gguf", tokenizer, 1505)
    fields = gguf.GGUFReader(path).fields
    types = fields["tokenizer.ggml.token_type"].contents()
    assert [types[row] for row in (0, 1, 1500, 1501, 1502, 1504)] == [3, 1, 4, 3, 5, 5]
    assert fields["tokenizer.ggml.tokens"].contents()[1500:] == [
        "<tool>",
        "<pad>",
        "[PAD1502]",
        "[PAD1503]",
        "[PAD1504]",
    ]
    assert fields["tokenizer.ggml.padding_token_id"].contents() == 1501
    check_same(path, tokenizer, ("call <tool> now<pad>",))


@pytest.mark.parametrize(
    ("template", "stored"),
    [
        ("{{ messages }}", "{{ messages }}"),
        ({"default": "{{ 1 }}", "rag": "{{ 2 }}"}, "{{ 1 }}"),
        (None, None),
    ],
)
def test_a_chat_template_is_text(tmp_path: Path, template: Any, stored: str | None) -> None:
    tokenizer = byte_level(("ByteLevel",))
    tokenizer.chat_template = template
    path = write(tmp_path / "vocab.gguf", tokenizer, 1500)
    assert read_gguf(path).metadata.get("tokenizer.chat_template") == stored


def changed(**changes: Any) -> PreTrainedTokenizerFast:
    """The toy tokenizer with other entries in its tokenizer.json."""
    spec = json.loads(toy_tokenizer().backend_tokenizer.to_str())
    model = changes.pop("model", {})
    spec |= changes
    spec["model"] |= model
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), bos_token=END)


_CUT = "in a way that llama.cpp has no name for"
_PREFIXED = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
_SPLIT = {
    "type": "Split",
    "pattern": {"Regex": r"\p{L}+|\s+"},
    "behavior": "Isolated",
    "invert": False,
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown expression": ({"pre_tokenizer": _SPLIT}, _CUT),
    "a space before every text": ({"pre_tokenizer": _PREFIXED}, _CUT),
    "no cutting at all": ({"pre_tokenizer": None}, _CUT),
    "lower case": ({"normalizer": {"type": "Lowercase"}}, _CUT),
    "dropout": ({"model": {"dropout": 0.1}}, "dropout, prefixes or suffixes"),
    "bytes without their tokens": (
        {"model": {"byte_fallback": True}},
        "prepares text for SentencePiece's BPE",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_llama_cpp_would_cut_otherwise_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        tokenizer_keys(changed(**changes), INFO, 512)


def test_other_models_of_tokenizers_are_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)])))
    with pytest.raises(SchemeError, match="its model is Unigram, not BPE"):
        tokenizer_keys(tokenizer, INFO, 512)


def test_a_token_beyond_the_embedding_is_refused() -> None:
    with pytest.raises(SchemeError, match="it has the id 511, and the embedding 500 rows"):
        tokenizer_keys(toy_tokenizer(), INFO, 500)


def test_merges_that_sentencepiece_would_not_make_are_refused() -> None:
    with pytest.raises(SchemeError, match="merges are not those of SentencePiece"):
        tokenizer_keys(sentencepiece(drop_merges=1), INFO, 2000)


def test_more_around_a_text_than_bos_and_eos_is_refused() -> None:
    tokenizer = byte_level(("ByteLevel",))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{END} {END} $A", special_tokens=[(END, 0)]
    )
    with pytest.raises(SchemeError, match="puts more around a text than bos and eos"):
        tokenizer_keys(tokenizer, INFO, 1500)


def test_a_name_depends_on_merges_too() -> None:
    spec = json.loads(byte_level(("ByteLevel",)).backend_tokenizer.to_str())
    assert pre_name(spec) == "gpt-2"
    spec["model"]["ignore_merges"] = True
    assert pre_name(spec) is None
