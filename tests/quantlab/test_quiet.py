"""Nothing is said on stderr unasked."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["quantlab.models", "quantlab.models.loading"])
def test_an_import_says_nothing(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "" and done.stderr == ""
