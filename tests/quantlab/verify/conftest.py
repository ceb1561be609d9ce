"""A toy folder in low bits, made once."""

from pathlib import Path

import pytest

from tests.quantlab.verify.folders import exported


@pytest.fixture(scope="session")
def low_bit_folder(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy Llama as w4g32 in compressed-tensors. Read only: copy it to change it."""
    return exported(toy_folder, tmp_path_factory.mktemp("low-bit") / "toy-w4g32")
