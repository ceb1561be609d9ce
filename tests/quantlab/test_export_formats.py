"""Which schemes a format takes, and what it says to the others."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from quantlab.errors import ConfigError, SchemeError
from quantlab.export.formats import FORMATS, find_format
from quantlab.export.usage import USAGE
from quantlab.schemes import Scheme

HELD = [
    "w2",
    "w3g32",
    "w4",
    "w4g64",
    "w5",
    "w6g64",
    "w7g16",
    "w8",
    "w8g128",
    "w8a8",
    "w4g64-gptq",
    "w3g64-awq-smooth",
    "fp8",
]
REFUSED = {
    "w16": "leaves the weights at 16 bits",
    "a8": "leaves the weights at 16 bits",
    "w4g64l8t": "carries no quantized attention",
    "p8t": "carries no quantized attention",
    "w4kv8": "attention, cache or hidden states",
    "nf4": "its weights are nf4",
    "w4-rotate": "rotate turns inputs as they arrive",
    "w4g64-gptq-bias": "no bias",
    "w4g64-mixed": "one width for all linears",
    "w4g32z": "packed zero points",
    "w4t": "per channel or per group",
    "w4a8": "8-bit activations go with 8-bit weights",
    "w8g64a8": "8-bit activations go with 8-bit weights",
    "w8a6": "at 8 bits, symmetric",
    "w8a8z": "at 8 bits, symmetric",
    "w8a8t": "dynamic scale per token",
}


@pytest.mark.parametrize("name", HELD)
def test_a_scheme_that_fits_passes(name: str) -> None:
    find_format("compressed-tensors").check(Scheme.parse(name))


@pytest.mark.parametrize("name", REFUSED)
def test_a_scheme_that_does_not_fit_is_refused_with_those_that_do(name: str) -> None:
    with pytest.raises(SchemeError, match=REFUSED[name]) as caught:
        find_format("compressed-tensors").check(Scheme.parse(name))
    assert f"cannot hold scheme {Scheme.parse(name).name}" in str(caught.value)
    assert "It holds symmetric weights of 2 to 8 bits per channel or group" in str(caught.value)


def test_an_unknown_format_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown format 'compressed_tensor'\. Did you mean 'compressed-tensors'"
    ):
        find_format("compressed_tensor")
    with pytest.raises(ConfigError, match="Known formats: compressed-tensors"):
        find_format("zzz")


def test_every_format_is_named_by_its_key() -> None:
    assert all(form.name == name and form.description for name, form in FORMATS.items())
    assert set(USAGE) == set(FORMATS), "a card says how each format is loaded"
    assert all(find_spec(form.module) for form in FORMATS.values())


def test_the_table_needs_no_torch() -> None:
    code = (
        "import sys, quantlab.export.formats, quantlab.export.atomic, quantlab.export.model_card\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
