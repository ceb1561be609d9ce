"""Folders of low-bit weights that are not what they say: refused in one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantlab.errors import CheckpointError, SchemeError
from quantlab.models.low_bit import load_low_bit
from tests.quantlab.models.folders import export, loaded


@pytest.fixture(scope="module")
def good(source: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("good") / "out"
    export(loaded(source("llama")), "w4a8tsv8ts-bias", out)
    return out


def of_linear(leaf: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["linears"][f"model.layers.0.{leaf}"].update(changes)


def moved(config: dict[str, Any]) -> None:
    config["linears"]["model.layers.7.mlp.up_proj"] = config["linears"].pop("model.layers.0.mlp.up_proj")


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "scheme": (lambda c: c.update(scheme="w4g3x"), "must name a scheme: that of .* has 'w4g3x'"),
    "no scheme": (lambda c: c.pop("scheme"), "must name a scheme"),
    "baseline": (lambda c: c.update(scheme="w16"), "must name a scheme"),
    "a place it has not": (lambda c: c.update(scheme="w4e8t"), "quantizes effective maps"),
    "a linear it has not": (moved, r"has 'model\.layers\.7\.mlp\.up_proj', LlamaForCausalLM has not"),
    "no weights": (of_linear("mlp.up_proj", weights="w99"), "must name the scheme of its weights"),
    "transposed": (of_linear("self_attn.q_proj", transposed=True), r"the architecture asks for \[64, 64\]"),
    "bias left out": (of_linear("mlp.up_proj", corrected_bias=False), "must speak of its corrected_bias"),
    "range left out": (of_linear("mlp.up_proj", inputs=None), "must speak of its input_low"),
    "rotated": (of_linear("mlp.up_proj", rotated=True), r"rotations\[64\].* must be a list of factors"),
    "no range": (lambda c: c["attention"].pop("model.layers.0.self_attn"), "static ranges must be stored"),
    "a range of text": (
        lambda c: c["attention"]["model.layers.0.self_attn"].update(attn_value=["a", "b"]),
        "must have a shape and float32 bytes",
    ),
    "turned heads": (lambda c: c.update(turned_heads=-3), "turned_heads must be the channels of a head"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_folder_is_refused_in_one_sentence(good: Path, tmp_path: Path, fault: str) -> None:
    change, says = BAD[fault]
    shutil.copytree(good, tmp_path / "bad")
    body = json.loads((good / "config.json").read_text())
    change(body["quantization_config"])
    (tmp_path / "bad/config.json").write_text(json.dumps(body))
    with pytest.raises((CheckpointError, SchemeError), match=says) as caught:
        load_low_bit(tmp_path / "bad", device="cpu")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_recipe_without_a_scheme_is_refused(source: Callable[..., Path], tmp_path: Path) -> None:
    export(loaded(source("llama")), "w4g32", tmp_path / "out", "compressed-tensors")
    (tmp_path / "out/recipe.json").write_text('{"scheme": 3}')
    with pytest.raises(CheckpointError, match=r"recipe\.json must name a scheme"):
        load_low_bit(tmp_path / "out", device="cpu")


def test_what_a_folder_without_a_recipe_does_to_inputs_is_not_left_out(
    source: Callable[..., Path], tmp_path: Path
) -> None:
    for scheme in ("w8a8", "w8kv8ts"):
        export(loaded(source("llama")), scheme, tmp_path / scheme, "compressed-tensors")
        (tmp_path / scheme / "recipe.json").unlink()
        with pytest.raises(CheckpointError, match="quantizes activations or the cache too"):
            load_low_bit(tmp_path / scheme, device="cpu")
