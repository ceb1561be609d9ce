"""Scheme names say what a figure needs, for every name that the grammar makes."""

import pytest
from hypothesis import given

from quantlab.schemes import SCHEMES, WEIGHT_FORMATS, Scheme, TensorSpec
from quantlab.schemes.places import PLACES
from reports.scheme_names import KINDS, read_scheme
from tests.quantlab.test_schemes import NAMED


@pytest.mark.parametrize(
    ("name", "bits", "series", "detail", "grid"),
    [
        ("w16", 16, "nothing", "", ""),
        ("w4", 4, "weights", "per channel", "w4"),
        ("w4g32z", 4, "weights", "groups of 32, zero point", "w4g32z"),
        ("w8a8", 8, "weights + activations", "weights per channel, activations per token", "w8"),
        ("w4a8", 4, "weights + activations at 8 bits", "weights per channel, activations per token", "w4"),
        ("w8a4", 4, "weights at 8 bits + activations", "weights per channel, activations per token", "w8"),
        ("l6t", 6, "attention logits", "per tensor", ""),
        ("l6m", 6, "attention logits", "per map", ""),
        ("l6tm1", 6, "attention logits", "per tensor, the added map only", ""),
        ("l4tm2", 4, "attention logits", "per tensor, the subtracted map only", ""),
        ("kv2czu128", 2, "KV cache", "per channel, zero point, the last 128 tokens as they are", ""),
        ("w4g64-gptq-mixed", 4, "weights", "groups of 64, gptq, mixed", "w4g64"),
        ("w4g64-gptq", 4, "weights", "groups of 64, gptq", "w4g64"),
        ("q2_k", 16, "q2_k", "q2_k", ""),
        ("nf4", 4, "weights", "nf4", "nf4"),
        ("q4_1", 4, "weights", "q4_1", "w4g32z"),
        ("q4_k-a8", 4, "weights + activations at 8 bits", "activations per token, q4_k", "q4_k"),
        ("llm_int8-rotate", 8, "weights", "llm_int8, rotate", "llm_int8"),
    ],
)
def test_scheme_names(name: str, bits: int, series: str, detail: str, grid: str) -> None:
    scheme = read_scheme(name)
    assert (scheme.bits, scheme.series, scheme.detail, scheme.weight_grid) == (bits, series, detail, grid)


def _agrees(scheme: Scheme) -> None:
    """The axis of a figure shows the bits of the scheme itself, and every quantized place."""
    read = read_scheme(scheme.name)
    specs = {letter: getattr(scheme, place.field) for letter, place in PLACES.items()}
    quantized = {letter: spec for letter, spec in specs.items() if spec is not None}
    assert read.bits == min((spec.bits for spec in quantized.values()), default=16)
    assert read.kinds.split(" + ") == ([KINDS[letter] for letter in quantized] or ["nothing"])
    for spec in quantized.values():
        if isinstance(spec, TensorSpec) and spec.group_size is not None:
            assert f"groups of {spec.group_size}" in read.detail


@pytest.mark.parametrize("name", [*SCHEMES, *WEIGHT_FORMATS])
def test_every_name_of_the_catalogue_goes_on_its_axis(name: str) -> None:
    _agrees(Scheme.parse(name))


@given(NAMED)
def test_every_name_that_is_built_goes_on_its_axis(scheme: Scheme) -> None:
    _agrees(scheme)


def test_every_place_has_words() -> None:
    assert KINDS.keys() == PLACES.keys()
