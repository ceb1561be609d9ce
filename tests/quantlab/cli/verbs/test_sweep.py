"""`quantlab sweep`, and the report and the folder that follow it."""

import json
from pathlib import Path

import pytest

from tests.quantlab.cli.command import quantlab, result_of


def test_sweep_ends_with_a_report_and_quantize_with_a_card(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "schemes: [w8, l6t]\nprofile: {text: {sequence_length: 32, num_sequences: 2}}\n"
        "evaluation: {hellaswag: {limit: 6}, perplexity: {sequence_length: 32, num_sequences: 6}}\n"
    )
    result = result_of(
        capsys, "sweep", toy_folder, "--config", grid, "--out", tmp_path / "run", "--workers", "2"
    )
    assert len(result["records"]) == 4 and Path(result["report"]).exists()
    rebuilt = result_of(capsys, "report", tmp_path / "run")
    assert rebuilt["report"] == result["report"]
    out = tmp_path / "w8"
    command = ("quantize", toy_folder, "--scheme", "w8", "--out", out, "--records", tmp_path / "run")
    assert result_of(capsys, *command)["path"] == str(out)
    assert "not measured" not in (out / "README.md").read_text(encoding="utf-8")
    code, _, err = quantlab(capsys, *command)
    assert code == 2 and "--overwrite" in err


def test_a_grid_file_keeps_its_dtype_and_a_null_section(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = tmp_path / "grid.yaml"
    text = "profile: {text: {sequence_length: 16, num_sequences: 1}}"
    grid.write_text(f"checkpoints: [{{path: x, dtype: bfloat16}}]\nevaluation: null\n{text}\n")
    result = result_of(
        capsys, "sweep", toy_folder, "--config", grid, "--seed", "3", "--out", tmp_path / "run"
    )
    (key,) = result["records"]
    record = json.loads((tmp_path / "run" / "records" / f"{key}.json").read_text())
    assert record["kind"] == "profile" and record["made_by"]["checkpoint"]["dtype"] == "bfloat16"
    assert record["made_by"]["profile"]["text"]["seed"] == 3
