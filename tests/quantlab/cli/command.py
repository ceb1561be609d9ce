"""A command as a user gives it, run in the test's process or in one of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantlab.cli import main

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
