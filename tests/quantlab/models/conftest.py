"""Checkpoints that are made once for a module."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.toys import FAMILIES, save_checkpoint

PAIR = Path(__file__).parents[3] / "quantlab/checkpoints/pair"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a toy checkpoint, or of a shipped one, by its name."""
    made: dict[str, Path] = {}

    def folder(family: str, **changes: Any) -> Path:
        if family not in FAMILIES:
            return PAIR / family
        key = f"{family} {changes}"
        if key not in made:
            wide = {} if family == "gpt2" else {"intermediate_size": 256}
            made[key] = save_checkpoint(family, tmp_path_factory.mktemp("low") / family, **(wide | changes))
        return made[key]

    return folder
