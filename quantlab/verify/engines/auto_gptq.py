"""auto-gptq 0.7.1: v1 folders of gptq on a CPU, in an environment of its own (`make readers`). Stand-alone.

Its last release: without a GPU it only infers, on dequantized weights, and in float32, since its float16 is for GPUs.
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

__all__ = ["VERSIONS", "load"]

Forward = Callable[[list[int]], tuple[np.ndarray, list[np.ndarray] | None]]


def VERSIONS() -> dict[str, str]:
    """Of what computes."""
    return {name: version(name) for name in ("auto-gptq", "transformers", "torch")}


def load(folder: str) -> Forward:
    """The model of a folder: token ids -> logits [T, V] and hidden states [T, D] of every layer, float32."""
    from auto_gptq import AutoGPTQForCausalLM

    model: Any = AutoGPTQForCausalLM.from_quantized(
        folder,
        device="cpu",
        torch_dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        disable_exllama=True,
        disable_exllamav2=True,
    )

    def forward(ids: list[int]) -> tuple[np.ndarray, list[np.ndarray] | None]:
        with torch.inference_mode():
            found = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        return found.logits[0].float().numpy(), [layer[0].float().numpy() for layer in found.hidden_states]

    return forward
