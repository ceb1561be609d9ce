"""The JSON files of a folder that transformers reads."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from quantlab.export.shards import Layout
from quantlab.export.tensors import dtype_name

__all__ = ["write_configs", "write_json"]


def write_configs(folder: Path, model: PreTrainedModel, layout: Layout, dtype: torch.dtype) -> None:
    """config.json and generation_config.json of a model whose linears are laid out so."""
    config = copy.deepcopy(model.config)
    # A GGUF's own entry cannot be written, and no longer holds.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    body = json.loads(config.to_json_string(use_diff=True))
    body |= {
        "architectures": [type(model).__name__],
        "dtype": dtype_name(dtype),
        "quantization_config": layout.quantization_config,
    }
    write_json(folder / "config.json", body)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        write_json(folder / "generation_config.json", json.loads(generation.to_json_string(use_diff=True)))


def write_json(path: Path, body: Mapping[str, Any]) -> None:
    """One JSON object as people read it."""
    path.write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
