"""Results on stdout, also where it cannot be written."""

import subprocess
from pathlib import Path

import pytest

from tests.quantlab.cli.command import process


@pytest.mark.parametrize("arguments", [["list", "schemes"], ["list", "schemes", "--json"]])
def test_a_full_output_is_one_sentence(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = process(*arguments, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2 and done.stderr.startswith(b"quantlab: stdout must be writable")
    assert b"Traceback" not in done.stderr
