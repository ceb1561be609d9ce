"""transformers: every folder that AutoModelForCausalLM loads, whatever library reads its weights. Stand-alone.

Weights and arithmetic are float32: what the format stores is then dequantized without rounding it again, where its
library lets it. gptqmodel, which reads gptq and awq for it, does not: its kernels dequantize to float16. With 4 bits it
picks torch's packed int4 product, also for group sizes that this does not have: those take its plain torch kernel. A
folder without config.json is read by its .gguf file.
"""

import json
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# What gptqmodel would compile by itself takes longer than a few passes save; it asks for two workers in any case.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import numpy as np
import torch

__all__ = ["VERSIONS", "load"]

Forward = Callable[[list[int]], tuple[np.ndarray, list[np.ndarray] | None]]

_INT4_GROUPS = (32, 64, 128, 256)
"""Of torch._weight_int4pack_mm_for_cpu."""
_HELPERS = ("compressed-tensors", "optimum", "gptqmodel", "bitsandbytes", "torchao", "optimum-quanto", "gguf")
"""Packages that read weights for transformers."""


def VERSIONS() -> dict[str, str]:
    """Of what computes, as far as it is installed."""
    found = {}
    for name in ("transformers", "torch", *_HELPERS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def load(folder: str, dtype: str = "float32") -> Forward:
    """The model of a folder: token ids -> logits [T, V] and hidden states [T, D] of every layer, float32.

    Args:
        dtype: what the model is loaded in; the library that reads the weights may compute in another.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "device_map": "cpu"}
    path = Path(folder) / "config.json"
    if path.exists():
        options |= _kernel(json.loads(path.read_text(encoding="utf-8")).get("quantization_config", {}))
    else:
        options["gguf_file"] = next(path.parent.glob("*.gguf")).name
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True, **options
    ).eval()

    def forward(ids: list[int]) -> tuple[np.ndarray, list[np.ndarray] | None]:
        with torch.inference_mode():
            found = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        return found.logits[0].float().numpy(), [layer[0].float().numpy() for layer in found.hidden_states]

    return forward


def _kernel(config: dict[str, Any]) -> dict[str, Any]:
    """The kernel to ask for, where the one that would be picked does not have the group size."""
    from transformers import AwqConfig, GPTQConfig

    method = config.get("quant_method")
    if method not in ("gptq", "awq") or config["bits"] != 4 or config["group_size"] in _INT4_GROUPS:
        return {}
    plain = GPTQConfig(bits=4, backend="gptq_torch") if method == "gptq" else AwqConfig(backend="torch_awq")
    return {"quantization_config": plain}
