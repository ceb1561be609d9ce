"""`quantlab allocate`."""

from pathlib import Path

import pytest

from tests.quantlab.cli.command import FAST, quantlab, result_of


def test_allocate_writes_a_recipe_and_measures_once(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    command = (
        *("allocate", toy_folder, "--bits", "4.6", "--widths", "w8,w4g32,w3g32", "--method", "gptq", *FAST),
        *("--set", f"cache={tmp_path / 'sensitivity'}", "-o", recipe),
    )
    result = result_of(capsys, *command)
    assert result["scheme"].endswith("-gptq-mixed") and result["average_storage_bits"] <= 4.6
    assert result["num_measured"] == 14 * 3 * 2 and Path(result["sensitivity"]).exists()
    code, _, err = quantlab(capsys, *command)
    assert code == 2 and "a recipe must not replace a file unasked" in err and err.count("\n") == 1
    code, out, err = quantlab(capsys, *command, "--overwrite")
    assert code == 0, err
    assert "chosen" in out and "w3g32 alone" in out and str(recipe) in out
    assert result_of(capsys, *command, "--overwrite") == result | {"num_measured": 0}


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (["--bits", "4.5", "--megabytes", "1"], "a budget is given either in bits or in megabytes"),
        (["--bits", "-1"], "a budget must be more than 0: found bits=-1"),
        (["--bits", "4.5", "--widths", "w4x"], "unknown scheme 'w4x'"),
        (["--bits", "1.5", "--widths", "w8"], "The smallest that does is --bits 8."),
    ],
)
def test_allocate_refuses_in_one_sentence(
    budget: list[str], text: str, toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--set", f"cache={tmp_path}", "-o", str(tmp_path / "recipe.yaml")]
    code, out, err = quantlab(capsys, "allocate", toy_folder, *budget, *FAST, *place)
    assert (code, out) == (2, "") and text in err and err.count("\n") == 1
    assert not (tmp_path / "recipe.yaml").exists()
