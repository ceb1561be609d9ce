"""A user's mistake is one sentence on stderr and exit code 2, before torch is imported where that can be told."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.quantlab.cli.command import FAST, ROOT, children_cpu_s, quantlab, result_of
from tests.toys import save_checkpoint

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


def _quantize_toy(family: str, *options: object, **changes: object) -> Breakage:
    """The options on another toy checkpoint."""

    def breakage(folder: Path) -> list[object]:
        toy = save_checkpoint(family, folder.parent / family, **changes)
        return ["quantize", toy, "--out", folder.parent / "low", *options]

    return breakage


def _existing_export(folder: Path) -> list[object]:
    (folder.parent / "low").mkdir()
    return ["quantize", folder, "--scheme", "w8", "--out", folder.parent / "low"]


def _configured(**changes: object) -> Breakage:
    def breakage(folder: Path) -> list[object]:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return _evaluate(folder)

    return breakage


def _convert(to: str) -> Breakage:
    return lambda folder: ["convert", folder, "--to", to, "--out", folder.parent / "converted"]


def _allocate(*options: object) -> Breakage:
    widths = ["--widths", "w8,w3"] if "--widths" not in options else []
    return lambda folder: ["allocate", folder, "-o", folder.parent / "recipe.yaml", *options, *widths]


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
    "no export": (_quantize("--scheme", "w8", "--set", "export=null"), "needs the section 'export'"),
    "rows of gptq": (
        _quantize_toy("llama", "--scheme", "w4g32-gptq", "--format", "gptq", num_key_value_heads=1),
        "out_features in multiples of 32: .*k_proj has .*out_features=16",
    ),
    "groups of quanto": (
        _quantize_toy("llama", "--scheme", "w4g32z", "--format", "quanto", intermediate_size=256),
        "quanto cuts 256 inputs in groups of 128: .*down_proj has groups of 32",
    ),
    "Conv1D": (
        _quantize_toy("gpt2", "--scheme", "w4g32-gptq"),
        "holds nn.Linear only: transformer.h.0.attn.c_attn is a Conv1D",
    ),
    "FalconLinear": (
        _quantize_toy("falcon", "--scheme", "w4g32-gptq", "--format", "torchao"),
        "holds nn.Linear only: transformer.h.0.* is a FalconLinear",
    ),
    "variant of no engine": (
        _quantize_toy("quantlab", "--scheme", "w4g32-gptq", variant="diff_v2"),
        "diff_v2 has no exact twin. Use --format quantlab",
    ),
    "export nowhere": (
        lambda folder: ["quantize", folder, "--scheme", "w8", "--out", "/proc/low"],
        "output folder must be writable: /proc is not",
    ),
    "convert to what": (
        _convert("lama"),
        "must be one of llama, diffllama, quantlab: found 'lama'. Did you mean",
    ),
    "convert from what": (_convert("diffllama"), "diffllama is made of quantlab"),
    "convert what": (
        lambda folder: [
            "convert",
            folder / "nowhere",
            "--to",
            "quantlab",
            "--out",
            folder.parent / "converted",
        ],
        "nowhere",
    ),
    "budget in bits": (_allocate("--bits", "1.0"), "1 bits do not. The smallest that does is --bits 3"),
    "budget in megabytes": (_allocate("--megabytes", "0.01"), "0.01 MB do not. The smallest that does is"),
    "widths": (_allocate("--bits", "4.5", "--widths", "w8,w4g64"), "group_size must divide in_features"),
    "recipe nowhere": (
        lambda folder: ["allocate", folder, "--bits", "6", "-o", "/proc/recipe.yaml"],
        "must be writable: /proc",
    ),
    "calibrate what": (lambda folder: ["calibrate", folder / "nowhere"], "nowhere"),
    "calibrate on what": (
        lambda folder: ["calibrate", folder, "--text", folder / "nowhere.txt"],
        "nowhere.txt",
    ),
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
    code = "import sys\nfrom quantlab.cli.app import exit_code\ncode = exit_code(sys.argv[1:])\n"
    code += "assert 'torch' not in sys.modules, 'torch was imported'\nsys.exit(code)"
    before = children_cpu_s()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    cpu_s = children_cpu_s() - before
    _check_complaint(done.returncode, done.stdout, done.stderr, sentence)
    assert cpu_s < 2, f"answered after {cpu_s:.1f} s"


@pytest.mark.parametrize(("breakage", "sentence"), LATE.values(), ids=LATE)
def test_bad_input_is_one_sentence(
    breakage: Breakage, sentence: str, victim: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if sentence == "(?i)cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    _check_complaint(*quantlab(capsys, *breakage(victim)), sentence)


def _check_complaint(code: int, out: str, err: str, sentence: str) -> None:
    assert code == 2, (code, err)
    assert out == "" and "Traceback" not in err
    line = err.strip()
    assert line.startswith("quantlab: ") and "\n" not in line, err
    assert re.search(sentence, line), line


def test_a_failure_keeps_what_was_recorded(victim: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = Path(result_of(capsys, *_evaluate(victim))["record"])
    before = record.read_bytes()
    _check_complaint(*quantlab(capsys, *_nonfinite(victim)), "up_proj")
    assert record.read_bytes() == before
