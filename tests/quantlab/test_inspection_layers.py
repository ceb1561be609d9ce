"""How many layers a checkpoint stores and a model has, where one block is stored for all."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from quantlab.config import CheckpointConfig
from quantlab.errors import CheckpointError
from quantlab.inspection.checkpoint import inspect_checkpoint
from quantlab.layers.targets import find_targets
from quantlab.models.loading import load_checkpoint
from tests.toys import save_checkpoint

SOLVERS = [("euler", 1), ("euler", 3), ("rk4", 4), ("rk4", 8), ("dopri5", 3)]
"""Solver, num_hidden_layers."""


@pytest.mark.parametrize(("solver", "num_layers"), SOLVERS)
def test_linears_of_one_block_are_those_of_the_model(tmp_path: Path, solver: str, num_layers: int) -> None:
    config = CheckpointConfig(path=str(_saved(tmp_path, solver, num_layers)))
    targets = find_targets(load_checkpoint(config).model)
    linears = {target.name: target.shape for target in targets if target.sort == "linear"}
    assert inspect_checkpoint(config).linears == linears
    assert len(linears) == 7 * (1 if solver == "dopri5" else num_layers)


@pytest.mark.parametrize("layer", [0, 1])
def test_one_block_is_stored_as_layer_0_alone(tmp_path: Path, layer: int) -> None:
    folder = _saved(tmp_path, "euler", 2)
    tensors = load_file(folder / "model.safetensors")
    moved = {name.replace("layers.0", "layers.1"): tensor.clone() for name, tensor in tensors.items()}
    save_file(moved if layer == 0 else tensors | moved, folder / "model.safetensors", {"format": "pt"})
    message = "layer 0 is missing" if layer == 0 else r"stored as layer 0, but holds .*layers\.1\."
    with pytest.raises(CheckpointError, match=message):
        inspect_checkpoint(CheckpointConfig(path=str(folder)))


def _saved(folder: Path, solver: str, num_layers: int) -> Path:
    options: dict[str, Any] = {"solver": solver}
    return save_checkpoint(
        "quantlab",
        folder / "toy",
        variant="continuous_depth",
        num_hidden_layers=num_layers,
        variant_options=options,
    )
