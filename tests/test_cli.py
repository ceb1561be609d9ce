"""The command line as a user meets it: results on stdout, one sentence on stderr, exit codes."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlab.cli import main

ROOT = Path(__file__).parent.parent
FAST = ["--sequence-length", "32", "--num-sequences", "2"]


def _quantlab(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, in this process."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, captured.out, captured.err


def _json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, out, err = _quantlab(capsys, *arguments, "--json")
    assert code == 0, err
    result: dict[str, Any] = json.loads(out)
    return result


def test_help_answers_in_half_a_second() -> None:
    walls = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "quantlab", "--help"], cwd=ROOT, check=True, capture_output=True
        )
        walls.append(time.perf_counter() - began)
    assert min(walls) < 0.5, walls


def test_profile_prints_the_magnitudes_and_the_record(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _json(capsys, "profile", toy_folder, *FAST, "--out", tmp_path / "run")
    for tensor in ("attention_logits", "hidden_states"):
        values = [result[tensor][name] for name in ("top1", "top2", "top3", "top10", "top100", "median")]
        assert values == sorted(values, reverse=True) and values[-1] > 0
    # 2 sequences, 2 layers, 4 heads, every causal pair of 32 tokens; 2 layers of 64 channels
    assert result["attention_logits"]["n"] == 2 * 2 * 4 * 32 * 33 // 2
    assert result["hidden_states"]["n"] == 2 * 2 * 32 * 64
    assert Path(result["record"]).exists()


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
    result = _json(capsys, *command)
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
    again = _json(capsys, *[str(part).replace("--sequence-length", "--sequence_length") for part in command])
    assert again == result and (record.read_bytes(), record.stat().st_mtime_ns) == written


def test_items_are_documents_by_position(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from quantlab.records import read_items

    result = _json(
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
                _json(capsys, "evaluate", toy_folder, "--limit", "3", *FAST, "--out", out, *options)["record"]
            ).stem
        )
    assert len(keys) == 1


def test_sweep_ends_with_a_report_and_quantize_with_a_card(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "schemes: [w8, l6t]\nprofile: {text: {sequence_length: 32, num_sequences: 2}}\n"
        "evaluation: {hellaswag: {limit: 4}, perplexity: {sequence_length: 32, num_sequences: 2}}\n"
    )
    result = _json(capsys, "sweep", toy_folder, "--config", grid, "--out", tmp_path / "run", "--workers", "2")
    assert len(result["records"]) == 4 and Path(result["report"]).exists()
    rebuilt = _json(capsys, "report", tmp_path / "run")
    assert rebuilt["report"] == result["report"]
    out = tmp_path / "w8"
    command = ("quantize", toy_folder, "--scheme", "w8", "--out", out, "--records", tmp_path / "run")
    assert _json(capsys, *command)["path"] == str(out)
    assert "not measured" not in (out / "README.md").read_text(encoding="utf-8")
    code, _, err = _quantlab(capsys, *command)
    assert code == 2 and "--overwrite" in err


@pytest.mark.parametrize("topic", ["schemes", "methods", "transforms", "formats", "statistics", "variants"])
def test_list_has_one_line_each(topic: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = _json(capsys, "list", topic)
    code, out, _ = _quantlab(capsys, "list", topic)
    assert code == 0 and len(out.splitlines()) == len(names) and all(names.values())


Breakage = Callable[[Path], list[object]]
"""Damages a copy of the toy checkpoint; returns the arguments that meet the damage."""


def _evaluate(folder: Path, *options: object) -> list[object]:
    return ["evaluate", folder, "--limit", "2", *FAST, "--out", folder.parent / "run", *options]


def _missing(folder: Path) -> list[object]:
    return _evaluate(folder / "nowhere")


def _no_checkpoint(folder: Path) -> list[object]:
    (folder / "config.json").unlink()
    return _evaluate(folder)


def _pickle(folder: Path) -> list[object]:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return _evaluate(folder)


def _truncated(folder: Path) -> list[object]:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return _evaluate(folder)


def _shard_outside(folder: Path) -> list[object]:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return _evaluate(folder)


def _quantize(*options: object) -> Breakage:
    return lambda folder: ["quantize", folder, "--out", folder.parent / "low", *options]


def _existing_export(folder: Path) -> list[object]:
    (folder.parent / "low").mkdir()
    return ["quantize", folder, "--scheme", "w8", "--out", folder.parent / "low"]


def _configured(**changes: object) -> Breakage:
    def breakage(folder: Path) -> list[object]:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return _evaluate(folder)

    return breakage


def _nonfinite(folder: Path) -> list[object]:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return _evaluate(folder)


def _too_few_rows(folder: Path) -> list[object]:
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = weights[name][:300].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return _configured(vocab_size=300)(folder)


def _with(*options: object) -> Breakage:
    return lambda folder: _evaluate(folder, *options)


def _with_file(name: str, content: bytes, option: str) -> Breakage:
    def breakage(folder: Path) -> list[object]:
        path = folder.parent / name
        path.write_bytes(content)
        return _evaluate(folder, option, path)

    return breakage


def _unwritable(folder: Path) -> list[object]:
    blocker = folder.parent / "file"
    blocker.write_text("a file where a folder should be")
    return [*_evaluate(folder)[:-1], blocker / "run"]


GOOD_ROW = {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["1", "2", "3", "4"], "label": 1}
BAD_ROWS = "\n".join(json.dumps(row) for row in (GOOD_ROW, GOOD_ROW | {"endings": ["1", "2", "3"]})).encode()

EARLY: dict[str, tuple[Breakage, str]] = {
    "missing folder": (_missing, "nowhere"),
    "not a checkpoint": (_no_checkpoint, "config.json"),
    "pickle": (_pickle, "safetensors"),
    "truncated": (_truncated, "model.safetensors"),
    "shard outside": (_shard_outside, "outside.safetensors"),
    "shapes": (_configured(intermediate_size=100), "mlp"),
    "unknown architecture": (_configured(model_type="lama"), "'llama'"),
    "no layers": (_configured(num_hidden_layers=0), "num_hidden_layers"),
    "remote code": (_configured(auto_map={"AutoModelForCausalLM": "x.Y"}, model_type="mine"), "trust"),
    "unknown scheme": (_with("--scheme", "nf5"), "scheme"),
    "bits": (_with("--scheme", "w9"), "bits must be 2 to 8"),
    "group size": (_with("--scheme", "w4g64"), "group_size must divide in_features"),
    "unknown key": (_with("--set", "evaluation.batchsize=3"), "Did you mean 'batch_size'"),
    "unknown statistic": (_with("--set", "profile.statistics=[kurtoses]"), "Did you mean 'kurtosis'"),
    "unknown task": (_with("--tasks", "hellaswag,arc"), "'hellaswag' or 'perplexity'"),
    "batch size": (_with("--batch-size", "none"), "batch_size"),
    "limit and items": (_with("--items", "0:2"), "limit or items, not both"),
    "empty text": (_with_file("empty.txt", b" \n", "--text"), "must not be empty"),
    "not UTF-8": (_with_file("latin.txt", b"caf\xe9", "--text"), "must be UTF-8"),
    "bad row": (
        _with_file("bad.jsonl", BAD_ROWS, "--hellaswag"),
        "row 2 .* must hold a list of 4 endings, found 3",
    ),
    "unwritable": (_unwritable, "must be writable"),
    "no task": (_with("--set", "evaluation.tasks=[]"), "evaluation.tasks"),
    "a section too few": (_with("--set", "evaluation=null"), "something to compute"),
    "skip pattern": (_with("--skip", "*.dwon_proj"), "Did you mean '\\*.down_proj'"),
    "export's group size": (_quantize("--scheme", "w4g64"), "group_size must divide in_features"),
    "export's scheme": (_quantize("--scheme", "l8t"), "compressed-tensors cannot hold scheme l8t"),
    "unknown format": (_quantize("--scheme", "w8", "--format", "gguff"), "unknown format 'gguff'"),
    "export exists": (_existing_export, "--overwrite"),
    "records nowhere": (
        _quantize("--scheme", "w8", "--records", "nowhere"),
        "nowhere has no folder 'records'",
    ),
}
"""Found from headers, configs, paths and names, before torch is imported."""

LATE: dict[str, tuple[Breakage, str]] = {
    "NaN in weights": (_nonfinite, "model.layers.1.mlp.up_proj.weight"),
    "token ids": (_too_few_rows, "300 rows"),
    "short text": (_with_file("short.txt", b"a few words", "--text"), "make 0 blocks of 32"),
    "no CUDA": (_with("--device", "cuda"), "(?i)cuda"),
}


@pytest.fixture
def victim(toy_folder: Path, tmp_path: Path) -> Path:
    """A copy of the toy checkpoint that may be damaged."""
    folder = tmp_path / "victim"
    shutil.copytree(toy_folder, folder)
    return folder


@pytest.mark.parametrize(("breakage", "sentence"), EARLY.values(), ids=EARLY)
def test_bad_input_is_one_sentence_before_torch(breakage: Breakage, sentence: str, victim: Path) -> None:
    arguments = [str(argument) for argument in breakage(victim)]
    code = "import sys\nfrom quantlab.cli import _exit_code\ncode = _exit_code(sys.argv[1:])\n"
    code += "assert 'torch' not in sys.modules, 'torch was imported'\nsys.exit(code)"
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    after = os.times()
    _check_complaint(done.returncode, done.stdout, done.stderr, sentence)
    # CPU time: on an idle machine the answer takes no longer, on a busy one the wall clock says nothing
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    assert cpu_s < 2, f"answered after {cpu_s:.1f} s"


@pytest.mark.parametrize(("breakage", "sentence"), LATE.values(), ids=LATE)
def test_bad_input_is_one_sentence(
    breakage: Breakage, sentence: str, victim: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if sentence == "(?i)cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    _check_complaint(*_quantlab(capsys, *breakage(victim)), sentence)


def _check_complaint(code: int, out: str, err: str, sentence: str) -> None:
    assert code == 2, (code, err)
    assert out == "" and "Traceback" not in err
    line = err.strip()
    assert line.startswith("quantlab: ") and "\n" not in line, err
    assert re.search(sentence, line), line


def test_a_failure_keeps_what_was_recorded(victim: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = Path(_json(capsys, *_evaluate(victim))["record"])
    before = record.read_bytes()
    _check_complaint(*_quantlab(capsys, *_nonfinite(victim)), "up_proj")
    assert record.read_bytes() == before


@pytest.mark.parametrize("arguments", [["list", "schemes"], ["list", "schemes", "--json"]])
def test_a_full_output_is_one_sentence(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "quantlab", *arguments],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == 2 and done.stderr.startswith(b"quantlab: stdout must be writable")
    assert b"Traceback" not in done.stderr


def test_a_grid_file_keeps_its_dtype_and_a_null_section(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = tmp_path / "grid.yaml"
    text = "profile: {text: {sequence_length: 16, num_sequences: 1}}"
    grid.write_text(f"checkpoints: [{{path: x, dtype: bfloat16}}]\nevaluation: null\n{text}\n")
    result = _json(capsys, "sweep", toy_folder, "--config", grid, "--seed", "3", "--out", tmp_path / "run")
    (key,) = result["records"]
    record = json.loads((tmp_path / "run" / "records" / f"{key}.json").read_text())
    assert record["kind"] == "profile" and record["made_by"]["checkpoint"]["dtype"] == "bfloat16"
    assert record["made_by"]["profile"]["text"]["seed"] == 3


def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = _quantlab(capsys, "evaluate")
    assert code == 2 and "MODEL" in err
    code, _, err = _quantlab(capsys, "evalute")
    assert code == 2 and "evalute" in err


def test_interruption_is_exit_code_130(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantlab import pipeline

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupt)
    code, _, err = _quantlab(capsys, "evaluate", toy_folder, "--out", tmp_path / "run")
    assert code == 130 and "goes on from there" in err


def test_a_bug_of_ours_keeps_its_traceback(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantlab import pipeline

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr(pipeline, "run", fail)
    with pytest.raises(AssertionError, match="ours"):
        main(["evaluate", str(toy_folder), "--out", str(tmp_path / "run")])


def test_allocate_writes_a_recipe_and_measures_once(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    command = (
        *("allocate", toy_folder, "--bits", "4.6", "--widths", "w8,w4g32,w3g32", "--method", "gptq", *FAST),
        *("--set", f"cache={tmp_path / 'sensitivity'}", "-o", recipe),
    )
    result = _json(capsys, *command)
    assert result["scheme"].endswith("-gptq-mixed") and result["average_storage_bits"] <= 4.6
    assert result["num_measured"] == 14 * 3 * 2 and Path(result["sensitivity"]).exists()
    code, _, err = _quantlab(capsys, *command)
    assert code == 2 and "a recipe must not replace a file unasked" in err and err.count("\n") == 1
    code, out, err = _quantlab(capsys, *command, "--overwrite")
    assert code == 0, err
    assert "chosen" in out and "w3g32 alone" in out and str(recipe) in out
    assert _json(capsys, *command, "--overwrite") == result | {"num_measured": 0}


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
    code, out, err = _quantlab(capsys, "allocate", toy_folder, *budget, *FAST, *place)
    assert (code, out) == (2, "") and text in err and err.count("\n") == 1
    assert not (tmp_path / "recipe.yaml").exists()


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
        result = _json(capsys, *command, "--hessian", hessian, "--out", tmp_path / "run")
        made_by = json.loads(Path(result["record"]).read_text(encoding="utf-8"))["made_by"]
        keys.append((made_by["method"]["hessian"], result["perplexity"]["nats_per_token"]))
    assert [key[0] for key in keys] == ["shared", "sequential"] and keys[0][1] != keys[1][1]
    code, _, err = _quantlab(capsys, *command, "--hessian", "both")
    assert code == 2 and "'shared' or 'sequential'" in err
