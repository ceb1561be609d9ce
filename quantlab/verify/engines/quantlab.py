"""quantlab: folders of every format that it decodes, with the kernels that it takes by itself. On a CPU, in float32."""

from collections.abc import Callable

import numpy as np
import torch

import quantlab
from quantlab.models.low_bit import load_low_bit

__all__ = ["VERSIONS", "load"]

Forward = Callable[[list[int]], tuple[np.ndarray, list[np.ndarray] | None]]


def VERSIONS() -> dict[str, str]:
    """Of what computes."""
    return {"quantlab": quantlab.__version__, "torch": torch.__version__}


def load(folder: str) -> Forward:
    """The model of a folder: token ids -> logits [T, V] and hidden states [T, D] of every layer, float32."""
    model = load_low_bit(folder, dtype="float32", device="cpu").model

    def forward(ids: list[int]) -> tuple[np.ndarray, list[np.ndarray] | None]:
        with torch.inference_mode():
            found = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        return found.logits[0].float().numpy(), [layer[0].float().numpy() for layer in found.hidden_states]

    return forward
