"""gptqmodel: folders of gptq and awq on a CPU, in an environment of its own (`make readers`). Stand-alone: no quantlab.

Its CPU kernels compute in float16 or bfloat16; float16 is taken, which holds the scales as they are stored. With 4 bits
it picks torch's packed int4 product, also for group sizes that this does not have: those take its plain torch kernel.
"""

import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Its pool of loaders asks for two workers, and a machine of two cores offers one.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
# What it would compile by itself takes longer than a few passes save.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import numpy as np
import torch

__all__ = ["VERSIONS", "load"]

ARITHMETIC = "float16"
"""What it computes in."""
Forward = Callable[[list[int]], tuple[np.ndarray, list[np.ndarray] | None]]

_INT4_GROUPS = (32, 64, 128, 256)
"""Of torch._weight_int4pack_mm_for_cpu."""


def VERSIONS() -> dict[str, str]:
    """Of what computes."""
    return {name: version(name) for name in ("gptqmodel", "transformers", "torch")}


def load(folder: str) -> Forward:
    """The model of a folder: token ids -> logits [T, V] and hidden states [T, D] of every layer, float32."""
    from gptqmodel import BACKEND, GPTQModel

    options = {"device": "cpu", "dtype": torch.float16, "trust_remote_code": False}
    model: Any = GPTQModel.load(folder, backend=BACKEND(_backend(folder)), **options).model.eval()

    def forward(ids: list[int]) -> tuple[np.ndarray, list[np.ndarray] | None]:
        with torch.inference_mode():
            found = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        return found.logits[0].float().numpy(), [layer[0].float().numpy() for layer in found.hidden_states]

    return forward


def _backend(folder: str) -> str:
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    packed = config["bits"] != 4 or config["group_size"] in _INT4_GROUPS
    return "auto" if packed else f"{config['quant_method']}_torch"
