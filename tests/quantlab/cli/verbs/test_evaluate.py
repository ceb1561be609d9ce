"""`quantlab evaluate`."""

import json
import math
from pathlib import Path

import pytest

from quantlab.records import read_record, what_was_computed
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


@pytest.mark.parametrize(("scheme", "num_keys"), [("w16", 2), ("w8a8", 1)])
def test_batch_size_is_in_the_key_of_what_it_moves_and_workers_in_none(
    scheme: str, num_keys: int, toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """w8a8 takes one document at a time, whatever is asked; w16's last digits depend on what shares a row."""
    records = []
    for number, options in enumerate(
        (["--batch-size", "1"], ["--batch-size", "8"], ["--batch-size", "8", "--set", "sweep.workers=2"])
    ):
        out = ["--scheme", scheme, "--out", tmp_path / str(number)]
        result = result_of(capsys, "evaluate", toy_folder, "--limit", "3", *FAST, *out, *options)
        records.append(read_record(Path(result["record"])))
    assert len({record.key for record in records}) == num_keys and records[1].key == records[2].key
    same = [what_was_computed(record.made_by) for record in records]
    assert same[0] == same[1] == same[2]


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


@pytest.mark.parametrize("method", ["gptq", "awq", "wclip", "autoround"])
def test_too_few_tokens_are_said_in_the_record_and_once_below_the_scores(
    method: str, toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--set", "quantize.methods.autoround.num_steps=2", *calibrated(tmp_path, 1, 16)]
    command = ["evaluate", toy_folder, "--scheme", f"w4g32-{method}", "--tasks", "perplexity", *FAST, *short]
    code, out, err = quantlab(capsys, *command, "--out", tmp_path / "run")
    assert code == 0, err
    few = {size: f"{method}: 16 tokens for {size} input channels: rank-deficient" for size in (64, 96)}
    (record,) = (tmp_path / "run/records").glob("*.json")
    table = json.loads(record.read_text(encoding="utf-8"))["result"]["quantization"]["table"]
    linears = [row for row in table if row["action"] == "swapped"]
    for row in linears:
        assert few[96 if row["name"].endswith("down_proj") else 64] in row["note"] and row["layers"]
    if method != "autoround":  # which says of each layer how far it came
        assert [out.count(f"{few[64]} (12 linears)"), out.count(f"{few[96]} (2 linears)")] == [1, 1]


def test_nothing_is_said_below_the_scores_where_nothing_is_to_say(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", toy_folder, "--scheme", "w4g32-wclip", "--tasks", "perplexity", *FAST]
    code, out, err = quantlab(capsys, *command, *calibrated(tmp_path, 4, 32), "--out", tmp_path / "run")
    assert code == 0 and "linears)" not in out, err


def test_a_window_says_what_was_read_behind_it(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blocks of 32 tokens score 31; of 31 * 32 / 2 reads, 15 * 16 / 2 are older than 16 tokens: 24.2%."""
    command = [
        "evaluate",
        toy_folder,
        "--scheme",
        "kv4u16",
        "--tasks",
        "perplexity",
        *FAST,
        "--out",
        tmp_path,
    ]
    code, printed, err = quantlab(capsys, *command)
    assert code == 0, err
    assert "read behind the window, from the quantized cache: 24.2% of perplexity" in printed
    code, _, err = quantlab(capsys, *command[:3], "kv4u64", *command[4:])
    assert code == 2 and "kv4u64 leaves the last 64 tokens as they are" in err
