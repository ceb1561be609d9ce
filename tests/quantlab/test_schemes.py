"""Scheme names: built from numbers, parsed back, and refused in one sentence when they cannot be honoured."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlab.errors import SchemeError
from quantlab.methods.formats import FORMATS
from quantlab.schemes import (
    METHODS,
    SCHEMES,
    TRANSFORMS,
    WEIGHT_FORMATS,
    Scheme,
    TensorSpec,
    check_shapes,
    places,
)
from quantlab.schemes.catalogue import FORMATS_TO_COME, explained
from quantlab.schemes.places import PLACES
from quantlab.schemes.spec import LETTER_OF


def _specs(*granularities: str, static: tuple[str, ...] = ()) -> st.SearchStrategy[TensorSpec | None]:
    def build(bits: int, granularity: str, size: int, symmetric: bool, fixed: bool) -> TensorSpec:
        group_size = size if granularity == "group" else None
        return TensorSpec(bits, granularity, group_size, symmetric, fixed and granularity in static)  # type: ignore[arg-type]

    values = (st.integers(2, 8), st.sampled_from(granularities), st.integers(2, 4096))
    return st.none() | st.builds(build, *values, st.booleans(), st.booleans())


def _cache() -> st.SearchStrategy[TensorSpec | None]:
    window = st.integers(1, 30).map(lambda blocks: 32 * blocks)
    return st.none() | st.builds(TensorSpec, st.integers(2, 8), st.just("channel"), window=window)


ALL_SCHEMES = st.builds(
    Scheme,
    weights=_specs("channel", "tensor", "group"),
    activations=_specs("row", "tensor", "channel", "group", static=("tensor", "channel")),
    query=_specs("row", "tensor", "head", "channel", "group", static=("tensor", "head", "channel")),
    cache=_cache(),
    logits=_specs("tensor", "map", "head", "row"),
    probs=_specs("tensor", "map", "head", "row").map(lambda spec: spec and replace(spec, symmetric=True)),
)
NAMED = st.builds(
    lambda scheme, method, transforms, mixed: (
        scheme
        if scheme.weights is None
        else replace(
            scheme,
            weights=replace(scheme.weights, symmetric=scheme.weights.symmetric and method != "hqq"),
            method=method,
            transforms=tuple(t for t in TRANSFORMS if t in transforms),
            mixed=mixed,
        )
    ),
    ALL_SCHEMES,
    st.sampled_from(list(METHODS)),
    st.sets(st.sampled_from(["fold", "smooth", "bias"])),
    st.booleans(),
)


@given(NAMED)
def test_every_value_has_a_name_that_parses_back(scheme: Scheme) -> None:
    assert Scheme.parse(scheme.name) == scheme
    assert Scheme.parse(scheme.name).name == scheme.name


@given(NAMED, NAMED)
def test_names_agree_exactly_when_schemes_do(one: Scheme, other: Scheme) -> None:
    assert (one.name == other.name) == (one == other)


@given(ALL_SCHEMES, st.data())
def test_case_order_and_dashes_parse(scheme: Scheme, data: st.DataObject) -> None:
    parts = [
        Scheme(**{field: getattr(scheme, field)}).name
        for field in ("weights", "activations", "query", "cache", "logits", "probs")
    ]
    shuffled = data.draw(st.permutations(parts))
    dashes = data.draw(st.sampled_from(["", "-", "--"]))
    letters = [part for part in shuffled if part != "w16"] or ["w16"]
    assert Scheme.parse(dashes.join(letters).upper()) == scheme


def test_known_examples_are_canonical() -> None:
    assert all(Scheme.parse(name).name == name for name in SCHEMES)
    assert all(line and "\n" not in line for line in SCHEMES.values())


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("W4A16", "w4"),
        ("w8-a8", "w8a8"),
        ("A8-W8", "w8a8"),
        ("W4A16-g128", "w4g128"),
        ("w4zg32", "w4g32z"),
        ("w8c", "w8"),
        ("a8r", "a8"),
        ("l8", "l8t"),
        ("p4", "p4t"),
        ("l16", "w16"),
        ("L4M", "l4m"),
        ("l4ma8p8m", "a8l4mp8m"),
        ("l4m2", "l4tm2"),
        ("l4m1h", "l4hm1"),
        ("l4zm", "l4mz"),
        ("w16a16", "w16"),
        (" w4g64a8l6t-rtn ", "w4g64a8l6t"),
        ("SMOOTH-w8a8-gptq", "w8a8-gptq-smooth"),
        ("w4-bias-rotate-fold", "w4-fold-rotate-bias"),
        ("kv8l6tw4g64a8-gptq", "w4g64a8kv8l6t-gptq"),
        ("l8r-NF4", "nf4-l8r"),
        ("kv2u128zc", "kv2czu128"),
        ("v8k8q8", "q8k8v8"),
        ("w4-mixed-gptq", "w4-gptq-mixed"),
    ],
)
def test_other_spellings(text: str, name: str) -> None:
    assert Scheme.parse(text).name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown scheme ''"),
        ("---", "unknown scheme"),
        ("w4q128", "2 to 8, or 16 for untouched: 'w4q128' asks for q128"),
        ("w4g12b", "unknown scheme 'w4g12b'.*Did you mean 'w4g128'"),
        ("w4-awqq", "unknown 'awqq' in scheme.*Did you mean 'awq'"),
        ("w9", "2 to 8, or 16 for untouched: 'w9' asks for w9"),
        ("a1", "2 to 8, or 16 for untouched: 'a1' asks for a1"),
        ("w8a8-g64", "must follow the part it belongs to"),
        ("w4-g64-g64", "takes one granularity"),
        ("w4tc", "takes one granularity"),
        ("w4a8w4", "names 'w' twice"),
        ("w4g1", "group_size must be at least 2"),
        ("w4r", "weights .* take a scale per c .channel., t .tensor., g .group.: found r"),
        ("w4h", "found h .head."),
        ("a8h", "inputs of linears .* found h .head."),
        ("l8c", "attention logits .* found c .channel."),
        ("p8g32", "attention probabilities .* found g .group."),
        ("w4s", "weights are always static"),
        ("a8s", "inputs of linears take static scales per t .tensor. or c .channel.: found rs"),
        ("a8g32s", "take static scales per .*: found gs"),
        ("l8ts", "attention logits have dynamic scales only: found ts. Leave the 's' out"),
        ("p8hs", "attention probabilities have dynamic scales only"),
        ("kv8rs", "take static scales per t .tensor., h .head. or c|take static scales per t .tensor. or h"),
        ("kv8t", "must not know of later tokens: kv8t spans the whole sequence. Use kv8ts"),
        ("kv4h", "must not know of later tokens: kv4h"),
        ("kv4c", "share a channel's scale over 32 tokens.*found no window. Use kv4cu128"),
        (
            "kv2czu16",
            "stored as many at a time as the window holds, a multiple of 32: found u16. Use kv2cu128",
        ),
        ("kv2czu40", "a multiple of 32: found u40"),
        ("k4u32", "a window of unquantized keys is the cache's .'kv'. alone: leave u32 out"),
        ("kv4u0", "a window must hold at least 1 key: found 0"),
        ("e4tm1", "a map is chosen of attention logits and probabilities only: leave m1 out"),
        ("l4tm1m2", "takes one granularity: found 'tm1m2'"),
        ("l4tm3", "unknown scheme 'l4tm3'"),
        ("l4mm2", "one map alone has one scale per map already: found .* .m. and m2. Write tm2"),
        ("e4m", "effective attention maps .* take a scale per t .tensor., h .head., r .row.: found m .map."),
        ("a8m", "inputs of linears .* found m .map."),
        ("p8tz", "probabilities .'p'. are never negative, so their codes begin at 0.*leave the 'z' out"),
        ("d8z", "lambda of each token .'d'. are never negative"),
        ("k8kv4", "the cache .'kv'. holds keys and values"),
        ("gptq", "gptq needs weights on a uniform grid .w4g64-gptq.: found none"),
        ("a8-awq", "awq needs weights on a uniform grid"),
        ("nf4-gptq", "gptq needs weights on a uniform grid .w4g64-gptq.: found nf4"),
        ("w4-gptq-awq", "names a weight method twice: 'awq' cannot be added"),
        ("w4-nf4", "names weights twice: 'nf4' cannot be added"),
        ("nf4-fp4", "names weights twice: 'fp4' cannot be added"),
        ("w4-rotate-spin", "spin is rotate with a learned rotation"),
        ("a8-bias", "bias makes up for the error of quantized weights: found none"),
        ("l8t-mixed", "mixed needs weights on a uniform grid"),
        ("w4g64-hqq", "hqq fits the zero points of weights: a symmetric grid has none. Add z"),
        ("kv8hs-rotate", "ranges from calibration are not theirs"),
        ("q8k8cs-spin", "ranges from calibration are not theirs"),
        ("w4v8ts-awq", "awq rescales values after their ranges were measured"),
        ("llm_int8-a8", "llm_int8 quantizes the inputs of linears its own way"),
        ("q2_k", "format 'q2_k' is not available"),
        ("l6t-MXFP8", "format 'mxfp8' is not available"),
        ("nf5", "unknown scheme 'nf5'.*Did you mean 'nf4'"),
        ("w" + "9" * 5000, "unknown scheme 'w9{39}\\.\\.\\.'"),
        ("w4g" + "1" * 5000, "unknown scheme"),
        ("w4-g" + "1" * 5000, "unknown 'g1{39}\\.\\.\\.' in scheme"),
        ("w16g64", "w16 in 'w16g64' stays untouched.*leave out 'g64'"),
        ("w16zs", "w16 in 'w16zs' stays untouched.*leave out 'zs'"),
        ("w4a16g32", "a16 in 'w4a16g32' stays untouched"),
        ("w16-g64", "must follow the part it belongs to"),
    ],
)
def test_refused_in_one_sentence(text: str, message: str) -> None:
    with pytest.raises(SchemeError, match=message) as caught:
        Scheme.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((9, "channel"), "bits must be 2 to 8"),
        ((4, "column"), "granularity must be one of"),
        ((4, "group"), "group_size goes with granularity group"),
        ((4, "channel", 32), "group_size goes with granularity group"),
    ],
)
def test_a_spec_that_means_nothing_cannot_be_built(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        TensorSpec(*arguments)  # type: ignore[arg-type]


def test_which_schemes_span_a_sequence() -> None:
    spanning = [
        "a8t",
        "w8a8t",
        "a8c",
        "l8t",
        "l8h",
        "p8t",
        "p4h",
        "w4g64a8l6t",
        "k8t",
        "q8h",
        "kv4cu128",
        "kv8u9",
    ]
    spanning += ["llm_int8"]
    single = [
        "w16",
        "w4",
        "w4t",
        "w4g64",
        "w8a8",
        "a8g32",
        "l8r",
        "p8r",
        "w4a8l4r",
        "k8",
        "kv8",
        "kv4g32",
        "a8ts",
    ]
    single += ["kv8ts", "nf4", "w4-gptq-rotate"]
    assert [Scheme.parse(name).spans_sequence for name in spanning] == [True] * len(spanning)
    assert [Scheme.parse(name).spans_sequence for name in single] == [False] * len(single)


def test_which_schemes_round_values() -> None:
    assert [Scheme.parse(name).rounds_values for name in ("w16", "w4g64z")] == [False] * 2
    assert [
        Scheme.parse(name).rounds_values
        for name in ("a8", "w8a8", "l8r", "p8t", "w4l4t", "kv8", "q4", "llm_int8")
    ] == [True] * 8


def test_what_schemes_need_of_calibration() -> None:
    needs = {
        "w4g64": set(),
        "w4z-hqq": set(),
        "kv8a8": set(),
        "w4-gptq": {"tokens", "inputs"},
        "w4-autoround": {"tokens"},
        "w4a4-rotate": {"tokens"},
        "w8a8-smooth": {"tokens", "inputs"},
        "a8ts": {"tokens", "inputs"},
        "kv8hs": {"tokens", "attention"},
    }
    assert {name: set(Scheme.parse(name).needs) for name in needs} == needs


def test_formats_are_weights() -> None:
    for name, form in WEIGHT_FORMATS.items():
        assert Scheme.parse(name).weights == form and Scheme.parse(name).name == name
    assert Scheme.parse("l8t-nf4").format == "nf4"
    linears = {"model.layers.0.mlp.down_proj": (64, 96)}
    with pytest.raises(
        SchemeError, match=r"in_features=96, group_size=64\. Use a scheme without blocks of 64"
    ):
        check_shapes(Scheme.parse("nf4"), linears)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("q8_0", "weights in GGUF's type q8_0: 8 bits, a float16 scale per 32 inputs"),
        (
            "q4_k",
            "weights in GGUF's type q4_k: 4 bits, 6-bit scale and minimum per 32 inputs; q5_0 where 256 does not "
            "divide the inputs",
        ),
    ],
)
def test_types_of_gguf_are_explained(name: str, line: str) -> None:
    assert explained()[name] == line


def test_every_format_of_weights_is_listed_once() -> None:
    assert set(WEIGHT_FORMATS) <= set(SCHEMES) | set(explained())
    assert not set(FORMATS_TO_COME) & set(WEIGHT_FORMATS) and not set(SCHEMES) & set(explained())
    assert set(FORMATS) == set(WEIGHT_FORMATS)


def test_the_baseline() -> None:
    assert Scheme().name == "w16" and Scheme.parse("w16").is_baseline
    assert not Scheme.parse("l8t").is_baseline


def test_group_size_must_divide() -> None:
    linears = {"model.layers.0.mlp.up_proj": (96, 64), "model.layers.0.mlp.down_proj": (64, 1376)}
    check_shapes(Scheme.parse("w4g32"), linears)
    check_shapes(Scheme.parse("w4g128"), linears, skip=["*.mlp.*"])
    message = (
        r"model.layers.0.mlp.down_proj has in_features=1376, group_size=128. "
        r'Use group_size=32, or add "\*.down_proj" to skip.'
    )
    with pytest.raises(SchemeError, match=message):
        check_shapes(Scheme.parse("w4g128"), linears, skip=["*.up_proj"])
    with pytest.raises(SchemeError, match=r"in_features=64, group_size=48. Use group_size=16"):
        check_shapes(Scheme.parse("a8g48"), linears)


def test_schemes_need_no_torch() -> None:
    code = "import sys, quantlab.schemes; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("letter", PLACES)
def test_what_the_letters_offer_can_be_asked_for(letter: str) -> None:
    place, line = PLACES[letter], places.explained()[f"{letter}N"]
    line = line.removesuffix("; never negative, so codes 0 to 2^N - 1")
    dynamic, _, static = line.partition("; static: ")
    offered = re.findall(r"(?:per|,) (\w+) (?:row|channel|tensor|map|head|group)", dynamic)
    assert offered == [LETTER_OF[g] + "N" * (g == "group") for g in place.by_itself or place.granularities]
    for grain in [*offered, *(f"{each}s" for each in static.split(", ") if each)]:
        assert Scheme.parse(f"{letter}4{grain.replace('N', '32')}")
