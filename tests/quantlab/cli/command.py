"""A command as a user gives it, run in the test's process or in one of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlab.cli import main
from tests.toys import toy_model, toy_tokenizer

ROOT = Path(__file__).parents[3]
FAST = ["--sequence-length", "32", "--num-sequences", "2"]


def quantlab(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, in this process."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, captured.out, captured.err


def result_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, out, err = quantlab(capsys, *arguments, "--json")
    assert code == 0, err
    result: dict[str, Any] = json.loads(out)
    return result


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """The command in a process of its own."""
    return subprocess.run([sys.executable, "-m", "quantlab", *arguments], cwd=ROOT, check=False, **options)


def children_cpu_s() -> float:
    """CPU time of the processes that have ended: on a busy machine the wall clock says nothing about a command."""
    times = os.times()
    return times.children_user + times.children_system


def calibrated(folder: Path, num_sequences: int, sequence_length: int) -> list[str]:
    """Options that calibrate on so much text, with the cache in the folder."""
    text = {"num_sequences": num_sequences, "sequence_length": sequence_length}
    settings = {f"text.{name}": value for name, value in text.items()} | {"cache": folder / "calibration"}
    return [part for name, value in settings.items() for part in ("--set", f"calibration.{name}={value}")]


def with_a_dead_channel(folder: Path) -> Path:
    """A toy checkpoint of four layers where one input of layer 2's down_proj is always 0."""
    model = toy_model("llama", num_hidden_layers=4)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[5] = 0
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder
