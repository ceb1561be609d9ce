"""Cells of a run that leave as folders: what was scored is what is written."""

import json
from pathlib import Path

import pytest

from quantlab.cli import main
from quantlab.records import read_records
from tests.toys import save_checkpoint

SETTINGS = ["--set", "evaluation.tasks=[perplexity]", "--set", "evaluation.perplexity.num_sequences=6"]
SETTINGS += ["--set", "evaluation.perplexity.sequence_length=32", "--set", "calibration.text.num_sequences=2"]
SETTINGS += ["--set", "calibration.text.sequence_length=64", "--set", "profile=null"]


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two schemes on two checkpoints."""
    root = tmp_path_factory.mktemp("cells")
    for family in ("llama", "qwen2"):
        save_checkpoint(family, root / family)
    cache = ["--set", f"calibration.cache={root / 'cache'}"]
    schemes = ["--schemes", "w4g32,w4g32-gptq,l6t", "--out", root / "run"]
    assert run("sweep", root / "llama", *schemes, *SETTINGS, *cache) == 0
    return root


def test_a_cell_leaves_with_its_scores(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of a method that needs calibration, whose settings are those of the run."""
    assert run("export", swept / "run", "W4-G32-gptq", "-o", swept / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["scheme"] == "w4g32-gptq"
    scored = {r.made_by["scheme"]: r for r in read_records(swept / "run") if r.kind == "evaluation"}
    recipe = json.loads((swept / "out/recipe.json").read_text())
    assert recipe["made_by"] == {
        name: scored["w4g32-gptq"].made_by[name] for name in ("calibration", "method")
    }
    card = (swept / "out/README.md").read_text()
    assert f"`{scored['w4g32-gptq'].key[:12]}`" in card and "not measured" in card  # hellaswag


def test_a_key_names_a_cell_and_the_folder_has_a_place_in_the_run(swept: Path) -> None:
    key = next(r.key for r in read_records(swept / "run") if r.made_by.get("scheme") == "w4g32")
    assert run("export", swept / "run", key[:12]) == 0
    assert (swept / "run/export/w4g32-compressed-tensors/model.safetensors").exists()


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("w4g64", "has none 'w4g64'. Did you mean 'w4g32'"),
        ("l6t", "carries no quantized attention"),
        ("w16", "it leaves the weights at 16 bits"),
        ("nonsense", "a cell is a scheme or a record's key"),
    ],
)
def test_a_cell_that_is_not_there_or_has_no_weights_is_refused(
    swept: Path, cell: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("export", swept / "run", cell, "-o", swept / "none") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (swept / "none").exists()


def test_a_checkpoint_that_changed_is_not_what_was_scored(
    swept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = swept / "llama/generation_config.json"
    before = config.read_text()
    config.write_text(before + " ")
    try:
        assert run("export", swept / "run", "w4g32", "-o", swept / "none") == 2
    finally:
        config.write_text(before)
    assert "must be what was scored" in capsys.readouterr().err


def test_shards_are_refused_where_a_format_is_one_file(
    swept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--format", "gguf", "--max-shard-size", "1000000", "-o", swept / "none"]
    assert run("quantize", swept / "llama", "--scheme", "q8_0", *options) == 2
    assert "a GGUF file is written whole" in capsys.readouterr().err
