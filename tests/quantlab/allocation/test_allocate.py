"""From a checkpoint and a budget to a recipe that loads, and every request that is refused."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantlab.allocation.allocate import allocate
from quantlab.allocation.budget import storage_bits
from quantlab.allocation.config import AllocationConfig
from quantlab.allocation.recipe import mixed_scheme, recipe_text
from quantlab.allocation.units import units_of
from quantlab.config import CheckpointConfig, load_config
from quantlab.errors import ConfigError, OutputError, SchemeError, UserError
from quantlab.models.loading import load_checkpoint
from quantlab.quantize import quantized
from quantlab.schemes import Scheme
from quantlab.sections import build_section
from tests.toys import toy_model

WIDTHS = ["w8", "w6", "w4g32", "w3g32"]


def _config(folder: Path, cache: Path, **changes: Any) -> AllocationConfig:
    tree: dict[str, Any] = {
        "checkpoint": {"path": str(folder)},
        "widths": WIDTHS,
        "text": {"sequence_length": 24, "num_sequences": 2},
        "cache": str(cache),
    }
    return build_section(AllocationConfig, tree | changes)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sensitivity")


def test_the_recipe_is_a_whole_run_with_a_width_for_every_linear(
    toy_folder: Path, cache: Path, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    result = allocate(_config(toy_folder, cache, bits=4.6, method="gptq"), path)
    run = load_config(path)
    model = load_checkpoint(CheckpointConfig(path=str(toy_folder))).model
    linears = [unit.name for unit in units_of(model, _config(toy_folder, cache, bits=4.6), 32)]
    assert list(run.quantize.widths) == linears and len(linears) == 14
    assert run.quantize.widths == result["widths"]
    assert run.name == "recipe" and run.checkpoints == (CheckpointConfig(path=str(toy_folder)),)
    (scheme,) = [Scheme.parse(name) for name in run.schemes if name != "w16"]
    assert scheme.name == result["scheme"] and scheme.mixed and scheme.method == "gptq"
    assert Counter(run.quantize.widths.values()) == result["num_linears"]
    assert run.evaluation is not None and run.evaluation.tasks == ("hellaswag", "perplexity")
    header = path.read_text()
    assert f"{result['average_storage_bits']:.4f} bits a weight" in header
    assert f"divergences sum to {result['divergence']:.4g} nats" in header and "held_out.txt" in header


def test_sizes_are_those_of_the_quantized_model(toy_folder: Path, cache: Path, tmp_path: Path) -> None:
    model = load_checkpoint(CheckpointConfig(path=str(toy_folder))).model
    result = allocate(_config(toy_folder, cache, bits=16.0), tmp_path / "recipe.yaml")
    for width in WIDTHS:
        with quantized(model, Scheme.parse(width)) as changes:
            alone = result["alone"][width]
            assert alone["average_storage_bits"] == pytest.approx(changes.average_storage_bits, rel=1e-12)
            assert alone["weights_bytes"] == changes.weights_bytes


def test_a_zero_point_and_a_tensor_scale_take_their_bits() -> None:
    of = {name: Scheme.parse(name).weights for name in ("w4g32z", "w8t")}
    # 8 x 64 codes; 16 groups with a scale of 16 bits and a zero point of 4; one scale
    assert storage_bits((8, 64), of["w4g32z"], 16) == 8 * 64 * 4 + 16 * (16 + 4)  # type: ignore[arg-type]
    assert storage_bits((8, 64), of["w8t"], 16) == 8 * 64 * 8 + 16  # type: ignore[arg-type]


def test_the_budget_holds_in_bits_and_in_megabytes(toy_folder: Path, cache: Path, tmp_path: Path) -> None:
    by_bits = allocate(_config(toy_folder, cache, bits=5.2), tmp_path / "bits.yaml")
    assert by_bits["average_storage_bits"] <= 5.2
    asked = by_bits["weights_bytes"] / 1e6
    by_size = allocate(_config(toy_folder, cache, megabytes=asked), tmp_path / "size.yaml")
    assert by_size["weights_bytes"] <= asked * 1e6
    assert by_size["divergence"] <= by_bits["divergence"] * (1 + 1e-12)
    assert by_bits["divergence"] < by_bits["alone"]["w4g32"]["divergence"]


def test_a_larger_budget_is_never_worse_and_one_above_all_gives_the_widest(
    toy_folder: Path, cache: Path, tmp_path: Path
) -> None:
    found = [
        allocate(_config(toy_folder, cache, bits=bits), tmp_path / f"{bits}.yaml")
        for bits in (4.0, 4.4, 5.0, 6.0, 16.0)
    ]
    sums = [each["divergence"] for each in found]
    assert sums == sorted(sums, reverse=True) and sums[0] > sums[-1]
    assert found[-1]["num_linears"] == {"w8": 14} and found[0]["num_linears"] == {"w3g32": 14}


def test_the_smallest_budget_that_is_named_is_enough(toy_folder: Path, cache: Path, tmp_path: Path) -> None:
    for asked in ({"bits": 2.0}, {"megabytes": 0.01}):
        with pytest.raises(
            ConfigError, match="a budget must hold every linear at the narrowest of"
        ) as refused:
            allocate(_config(toy_folder, cache, **asked), tmp_path / "recipe.yaml")
        kind, value = str(refused.value).partition("that does is --")[2].partition(";")[0].split()
        result = allocate(_config(toy_folder, cache, **{kind: float(value)}), tmp_path / f"{kind}.yaml")
        # sizes are named to 4 decimals of a bit and to 1 kB
        assert result["weights_bytes"] - result["alone"]["w3g32"]["weights_bytes"] < 1000
    assert not (tmp_path / "recipe.yaml").exists()


def test_what_was_measured_serves_other_budgets_and_widths(toy_folder: Path, tmp_path: Path) -> None:
    first = allocate(_config(toy_folder, tmp_path / "cache", bits=5.0), tmp_path / "a.yaml")
    again = allocate(
        _config(toy_folder, tmp_path / "cache", bits=4.5, widths=["w3g32", "w5"]), tmp_path / "b.yaml"
    )
    other = allocate(
        _config(toy_folder, tmp_path / "cache", bits=4.5, text={"sequence_length": 16}), tmp_path / "c.yaml"
    )
    assert (first["num_measured"], again["num_measured"]) == (14 * 4 * 2, 14 * 2)
    assert first["sensitivity"] == again["sensitivity"] != other["sensitivity"]


def test_skipped_linears_stay_at_16_bits_within_the_budget(
    toy_folder: Path, cache: Path, tmp_path: Path
) -> None:
    result = allocate(_config(toy_folder, cache, bits=9.0, skip=["*.down_proj"]), tmp_path / "recipe.yaml")
    assert not any("down_proj" in name for name in result["widths"]) and len(result["widths"]) == 12
    assert load_config(tmp_path / "recipe.yaml").quantize.skip == ("*.down_proj",)
    assert result["average_storage_bits"] <= 9.0


REFUSED: list[tuple[dict[str, Any], type[UserError], str]] = [
    (
        {"bits": 4.5, "megabytes": 1.0},
        ConfigError,
        "either in bits or in megabytes: found bits=4.5 and megabytes=1",
    ),
    ({}, ConfigError, "either in bits or in megabytes: found none"),
    ({"bits": 0.0}, ConfigError, "a budget must be more than 0: found bits=0"),
    ({"megabytes": -3.0}, ConfigError, "a budget must be more than 0: found megabytes=-3"),
    ({"bits": 4.5, "widths": ["w4g64", "w44x"]}, SchemeError, "unknown scheme 'w44x'"),
    (
        {"bits": 4.5, "widths": ["w8a8"]},
        SchemeError,
        "bits of weights and nothing else, as w8 or w3g64: 'w8a8' is more",
    ),
    ({"bits": 4.5, "widths": ["w4-gptq"]}, SchemeError, "'w4-gptq' is more"),
    ({"bits": 4.5, "widths": ["nf4"]}, SchemeError, "'nf4' is more"),
    ({"bits": 4.5, "widths": []}, ConfigError, "widths in options"),
    ({"bits": 4.5, "method": "magic"}, SchemeError, "weight method must be one of"),
    ({"bits": 4.5, "method": "magic", "widths": ["w16"]}, SchemeError, "weight method must be one of"),
    (
        {"bits": 6.0, "method": "hqq", "widths": ["w8z", "w4g16"]},
        SchemeError,
        "a symmetric grid has none. Add z",
    ),
]


@pytest.mark.parametrize(("asked", "error", "text"), REFUSED)
def test_a_request_that_means_nothing_is_refused(
    asked: dict[str, Any], error: type[UserError], text: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as refused:
        _config(tmp_path, tmp_path, **asked)
    assert text in str(refused.value)


def test_a_width_that_does_not_fit_and_a_model_without_linears_are_refused(tmp_path: Path) -> None:
    config = _config(tmp_path, tmp_path, bits=4.5, widths=["w8", "w4g64"])
    with pytest.raises(
        SchemeError, match=r"group_size must divide in_features: .*down_proj has in_features=96"
    ):
        units_of(toy_model("llama"), config, 32)
    skipped = _config(tmp_path, tmp_path, bits=4.5, skip=["*_proj"])
    with pytest.raises(SchemeError, match="a scheme must quantize some linear of the decoder layers"):
        units_of(toy_model("llama"), skipped, 32)


def test_a_recipe_replaces_no_file_unasked(toy_folder: Path, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("edited by hand")
    config = _config(toy_folder, cache, bits=4.6)
    with pytest.raises(
        OutputError, match=r"a recipe must not replace a file unasked: .* exists\. Add --overwrite"
    ):
        allocate(config, path)
    assert path.read_text() == "edited by hand"
    allocate(config, path, overwrite=True)
    assert load_config(path).quantize.widths
    with pytest.raises(OutputError, match="a recipe is one file"):
        allocate(config, tmp_path)


def test_one_matrix_under_two_names_gets_one_width() -> None:
    model = toy_model("llama")
    layers = model.get_submodule("model.layers")
    first, second = (layers.get_submodule(f"{index}.mlp") for index in (0, 1))
    second.up_proj = first.up_proj
    units = units_of(
        model, AllocationConfig(checkpoint=CheckpointConfig(path="toy"), bits=4.0, widths=("w8",)), 32
    )
    (shared,) = [unit for unit in units if len(unit.names) == 2]
    assert shared.names == ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj") and len(units) == 13


def test_the_scheme_of_a_recipe_is_named_for_the_width_of_most() -> None:
    assert mixed_scheme(["w8", "w4g64", "w4g64", "w16", "w16", "w16"], "gptq") == "w4g64-gptq-mixed"
    assert mixed_scheme(["w16"], "rtn") == "w8-mixed"


@pytest.mark.parametrize(
    "path",
    [
        "C: odd",
        "null",
        "package://quantlab/checkpoints/pair/standard",
        "a # b",
        "1e3",
        "üñ/ü",
        "-x",
        "org/name",
    ],
)
def test_any_path_survives_the_recipe(path: str) -> None:
    checkpoint = CheckpointConfig(path=path, dtype="bfloat16", revision="1.0")
    tree = yaml.safe_load(
        recipe_text("a b", checkpoint, "w8-mixed", {"h.0.mlp": "w8", "top": "w4"}, ["#: x"])
    )
    assert tree["checkpoints"] == [{"path": path, "dtype": "bfloat16", "revision": "1.0"}]
    assert tree["name"] == "a-b" and tree["quantize"]["widths"] == {"h.0.mlp": "w8", "top": "w4"}
