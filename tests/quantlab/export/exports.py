"""Exports of models in memory, in compressed-tensors format."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from quantlab.config import CheckpointConfig, QuantizeConfig
from quantlab.export.folder import ExportSummary, export_checkpoint
from quantlab.models.loading import Checkpoint, load_checkpoint
from quantlab.schemes import Scheme


def loaded(folder: Path, **options: Any) -> Checkpoint:
    return load_checkpoint(CheckpointConfig(path=str(folder), device="cpu", **options))


def export(
    checkpoint: Checkpoint, out: Path, scheme: str = "w4g32", skip: Sequence[str] = (), **options: Any
) -> ExportSummary:
    config = QuantizeConfig(skip=tuple(skip))
    return export_checkpoint(
        checkpoint, Scheme.parse(scheme), "compressed-tensors", out, config=config, **options
    )


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors
