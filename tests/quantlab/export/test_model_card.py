"""The model card: scores only from matching records, valid front matter, nothing that a name can inject."""

import re
from dataclasses import replace
from typing import Any

import pytest
import yaml

from quantlab.export.engines import Engine
from quantlab.export.model_card import CardFacts, matching_scores, model_card
from quantlab.records import Record
from quantlab.schemes import WEIGHT_FORMATS, Scheme

HASH = "5e" * 32
SCHEME = Scheme.parse("w4g32")
FACTS = CardFacts(
    scheme=SCHEME,
    format_name="compressed-tensors",
    layout="pack-quantized",
    base_model="toy/llama",
    content_hash=HASH,
    source_precision="bfloat16",
    stored_dtype="bfloat16",
    num_swapped=14,
    skipped=(),
    skip=(),
    average_storage_bits=4.5,
    weights_bytes=123_456,
    tied_embeddings=True,
    engines=(Engine("vLLM", "elsewhere", "faster", "Integer products."),),
)
HELLASWAG = {
    "n": 64,
    "acc": 0.375,
    "acc_interval": [0.26, 0.5],
    "acc_norm": 0.453125,
    "acc_norm_interval": [0.33, 0.57],
}
PERPLEXITY = {
    "num_tokens": 8192,
    "nats_per_token": 3.25,
    "nats_per_token_interval": [3.1, 3.4],
    "perplexity": 25.79,
    "perplexity_interval": [22.2, 29.9],
}


def record(result: dict[str, Any], content_hash: str = HASH, scheme: str = "w4g32", **made_by: Any) -> Record:
    made_by |= {"checkpoint": {"content_hash": content_hash}, "scheme": scheme}
    return Record.of("evaluation", made_by, {}, result)


def front_matter(card: str) -> dict[str, Any]:
    opening, front, _ = re.split(r"^---\n", card, maxsplit=2, flags=re.MULTILINE)
    assert not opening
    parsed = yaml.safe_load(front)
    assert isinstance(parsed, dict)
    return parsed


def card_of(*records: Record, **changes: Any) -> str:
    facts = replace(FACTS, **changes)
    return model_card(facts, matching_scores(records, facts.content_hash, facts.scheme, facts.skip))


def test_measured_scores_stand_with_interval_count_and_record() -> None:
    measured = record({"hellaswag": HELLASWAG, "perplexity": PERPLEXITY})
    card = card_of(measured)
    assert (
        f"| HellaSwag, zero-shot | acc_norm | 0.4531 | 0.3300 to 0.5700 | 64 documents | `{measured.key[:12]}` |"
        in card
    )
    assert "| text | perplexity | 25.7900 | 22.2000 to 29.9000 | 8,192 tokens |" in card
    assert "not measured" not in card
    index = front_matter(card)["model-index"][0]["results"]
    metric = index[0]["metrics"][1]
    assert index[0]["dataset"]["type"] == "hellaswag"
    assert metric["value"] == 0.453125
    assert metric["args"] == {"n": 64, "interval_95": [0.33, 0.57], "record": measured.key}


@pytest.mark.parametrize(
    "other",
    [
        record({"hellaswag": HELLASWAG}, content_hash="00" * 32),
        record({"hellaswag": HELLASWAG}, scheme="w4g64"),
        record({"hellaswag": HELLASWAG}, quantize={"skip": ["*.down_proj"]}),
        Record.of(
            "profile",
            {"checkpoint": {"content_hash": HASH}, "scheme": "w4g32"},
            {},
            {"hellaswag": HELLASWAG},
        ),
    ],
    ids=["content", "scheme", "skip", "kind"],
)
def test_scores_of_other_weights_are_not_shown(other: Record) -> None:
    card = card_of(other)
    assert "## Scores\n\nnot measured" in card
    assert "model-index" not in front_matter(card)


def test_the_order_of_skip_patterns_does_not_matter() -> None:
    made = record({"hellaswag": HELLASWAG}, quantize={"skip": ["a", "b"]})
    assert "not measured" not in card_of(made, skip=("b", "a")).replace("perplexity: not measured", "")


def test_the_card_says_when_scores_are_of_scales_in_another_dtype() -> None:
    measured = record({"hellaswag": HELLASWAG})
    assert "scales in float32; the scales of this folder are rounded to bfloat16" in card_of(measured)
    assert "on the codes and scales of this folder" in card_of(measured, stored_dtype="float32")
    rounded = record({"hellaswag": HELLASWAG}, quantize={"scale_dtype": "bfloat16"})
    assert "on the codes and scales of this folder" in card_of(rounded)


@pytest.mark.parametrize(
    ("kernels", "words"),
    [
        ({"int8_mm": 14}, "Its linears ran as integer products of codes."),
        ({"simulated": 14}, "Its linears ran in floats on rounded inputs and dequantized weights."),
        ({"weight_only": 14}, "Its linears ran in floats on dequantized weights."),
    ],
)
def test_the_card_says_which_kernels_ran(kernels: dict[str, int], words: str) -> None:
    card = card_of(record({"hellaswag": HELLASWAG, "quantization": {"kernels": kernels}}))
    assert words in card
    assert "ran" not in card_of(record({"hellaswag": HELLASWAG})).partition("Measured by")[2].split("\n")[0]


def test_a_task_without_a_score_says_so() -> None:
    card = card_of(record({"hellaswag": HELLASWAG}))
    assert "perplexity: not measured" in card
    assert len(front_matter(card)["model-index"][0]["results"]) == 1


def test_the_largest_evaluation_wins_whatever_the_order() -> None:
    small, large = (record({"hellaswag": HELLASWAG | {"n": n}}, limit=n) for n in (64, 640))
    assert card_of(small, large) == card_of(large, small)
    assert "640 documents" in card_of(small, large)


def test_front_matter_names_the_source_and_how_it_was_made() -> None:
    front = front_matter(card_of())
    assert front["base_model"] == "toy/llama"
    assert front["base_model_relation"] == "quantized"
    assert "library_name" not in front
    here = (Engine("transformers", "here", "smaller"),)
    assert front_matter(card_of(engines=here))["library_name"] == "transformers"
    assert {"compressed-tensors", "w4g32", "4-bit"} <= set(front["tags"])


@pytest.mark.parametrize(
    ("scheme", "codes", "scales"),
    [
        ("w4g32", "round to nearest", "bfloat16"),
        ("fp8", "the format fp8 itself", "bfloat16"),
        ("nf4", "the format nf4 itself", "float32"),
        ("q4_k", "the format q4_k itself", "float16 and small integers, as the type has them"),
        ("w16", "nothing", "none"),
    ],
)
def test_the_card_says_how_codes_and_scales_are_made(scheme: str, codes: str, scales: str) -> None:
    card = card_of(scheme=Scheme.parse(scheme))
    assert f"| codes chosen by | {codes} |" in card and f"| scales | {scales} |" in card


def test_every_format_with_scales_of_its_own_is_measured_on_the_codes_of_the_folder() -> None:
    for form in WEIGHT_FORMATS:
        card = card_of(record({"hellaswag": HELLASWAG}, scheme=form), scheme=Scheme.parse(form))
        rounded = form in ("fp8", "fp8e5m2")
        assert ("on the codes and scales of this folder" in card) != rounded
        assert ("| scales | bfloat16 |" in card) == rounded


def test_what_keeps_its_precision_is_named_by_its_types() -> None:
    assert "| kept in bfloat16 |" in card_of()
    assert "| kept in F16 and F32 |" in card_of(kept_in="F16 and F32")


def test_a_score_that_is_not_finite_is_shown_as_such() -> None:
    card = card_of(record({"perplexity": PERPLEXITY | {"perplexity": float("inf")}}))
    assert "| text | perplexity | not finite |" in card


def test_a_source_that_was_quantized_before_is_labelled() -> None:
    assert "already quantized (dequantized Q4\\_1)" in card_of(source_precision="dequantized Q4_1")
    assert "already quantized" not in card_of()


def test_skipped_linears_are_listed() -> None:
    card = card_of(skip=("*.down_proj",), skipped=("model.layers.0.mlp.down_proj",))
    assert "skipped by request: `model.layers.0.mlp.down_proj`" in card


def test_a_hostile_name_stays_text() -> None:
    name = "a: [b]\n---\nlicense: mit # <script>alert(1)</script> | `x` **y**"
    card = card_of(base_model=name)
    front = front_matter(card)
    assert front["base_model"] == " ".join(name.split())
    assert "license" not in front
    body = re.split(r"^---\n", card, maxsplit=2, flags=re.MULTILINE)[2]
    assert "<script>" not in body
    assert body.startswith("\n# a: ")
