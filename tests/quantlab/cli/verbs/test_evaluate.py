"""`quantlab evaluate`."""

import json
import math
from pathlib import Path

import pytest

from tests.quantlab.cli.command import FAST, calibrated, quantlab, result_of, with_a_dead_channel


def test_evaluate_prints_scores_with_their_uncertainty_and_reuses_its_record(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        "evaluate",
        toy_folder,
        "--limit",
        "6",
        *FAST,
        "--out",
        tmp_path / "run",
        "--scheme",
        "W4A16-g32",
    )
    result = result_of(capsys, *command)
    assert result["scheme"] == "w4g32" and result["hellaswag"]["n"] == 6
    for score in ("acc", "acc_norm", "margin"):
        low, high = result["hellaswag"][f"{score}_interval"]
        assert low <= result["hellaswag"][score] <= high
    assert result["perplexity"]["num_tokens"] == 2 * 31
    assert result["perplexity"]["perplexity"] == pytest.approx(
        math.exp(result["perplexity"]["nats_per_token"])
    )
    record = Path(result["record"])
    written = record.read_bytes(), record.stat().st_mtime_ns
    again = result_of(
        capsys, *[str(part).replace("--sequence-length", "--sequence_length") for part in command]
    )
    assert again == result and (record.read_bytes(), record.stat().st_mtime_ns) == written


def test_items_are_documents_by_position(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from quantlab.records import read_items

    result = result_of(
        capsys, "evaluate", toy_folder, "--tasks", "hellaswag", "--items", "7:10", "--out", tmp_path / "run"
    )
    assert "perplexity" not in result
    record = Path(result["record"])
    assert list(read_items(tmp_path / "run", record.stem, "hellaswag")["item"]) == [7, 8, 9]


def test_batch_size_and_workers_change_no_key(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = set()
    for number, options in enumerate(
        (["--batch-size", "1"], ["--batch-size", "8", "--set", "sweep.workers=2"])
    ):
        out = tmp_path / str(number)
        keys.add(
            Path(
                result_of(capsys, "evaluate", toy_folder, "--limit", "3", *FAST, "--out", out, *options)[
                    "record"
                ]
            ).stem
        )
    assert len(keys) == 1


def test_hessian_reaches_the_methods(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ["--set", "calibration.text.num_sequences=2", "--set", "calibration.text.sequence_length=16"]
    cache = ["--set", f"calibration.cache={tmp_path / 'calibration'}"]
    keys = []
    for hessian in ("shared", "sequential"):
        command = [
            "evaluate",
            toy_folder,
            "--scheme",
            "w3-gptq",
            "--tasks",
            "perplexity",
            *FAST,
            *text,
            *cache,
        ]
        result = result_of(capsys, *command, "--hessian", hessian, "--out", tmp_path / "run")
        made_by = json.loads(Path(result["record"]).read_text(encoding="utf-8"))["made_by"]
        keys.append((made_by["method"]["hessian"], result["perplexity"]["nats_per_token"]))
    assert [key[0] for key in keys] == ["shared", "sequential"] and keys[0][1] != keys[1][1]
    code, _, err = quantlab(capsys, *command, "--hessian", "both")
    assert code == 2 and "'shared' or 'sequential'" in err


def test_a_fallback_is_named_with_its_layer_in_the_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", with_a_dead_channel(tmp_path / "toy"), "--scheme", "w4g32-gptq"]
    options = ["--tasks", "perplexity", *FAST, *calibrated(tmp_path, 8, 32)]
    result = result_of(capsys, *command, *options, "--out", tmp_path / "run")
    table = json.loads(Path(result["record"]).read_text(encoding="utf-8"))["result"]["quantization"]["table"]
    noted = [row for row in table if "note" in row]
    assert [(row["count"], row["name"], row["layers"], row["note"]) for row in noted] == [
        (1, "model.layers.*.mlp.down_proj", "2", "gptq: 1 dead input channels take their nearest codes")
    ]
    plain = [row for row in table if row["name"] == "model.layers.*.mlp.down_proj" and "note" not in row]
    assert [(row["count"], row["why"], "layers" in row) for row in plain] == [(3, "w4g32-gptq", False)]
