"""optimum-quanto: folders that its own QuantizedModelForCausalLM loads. Stand-alone.

The model computes in the dtype of the folder's config.json, which quanto's loader takes no other for: where that is
bfloat16, `ARITHMETIC()` says so. Bytes of 4 and 2 bits are cut here, not in the C++ that quanto would compile into its
installation at their first use (25 s, and a compiler has to be there); `QUANTLAB_QUANTO_COMPILES=1` lets it.

qint8 codes are copied once they are loaded: torch's product of int8 weights with bfloat16 inputs, which quanto calls on
a CPU, ends the process (SIGSEGV) where they do not begin at a multiple of 64 bytes, as in a mapped file they may not.
"""

import os
from collections.abc import Callable
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

__all__ = ["ARITHMETIC", "VERSIONS", "load", "load_model"]

Forward = Callable[[list[int]], tuple[np.ndarray, list[np.ndarray] | None]]

_loaded = {"dtype": "float32"}


def VERSIONS() -> dict[str, str]:
    """Of what computes."""
    return {name: version(name) for name in ("optimum-quanto", "transformers", "torch")}


def ARITHMETIC() -> str:
    """What the model that was loaded last computes in."""
    return _loaded["dtype"]


def load(folder: str) -> Forward:
    """The model of a folder: token ids -> logits [T, V] and hidden states [T, D] of every layer, float32."""
    model = load_model(folder)

    def forward(ids: list[int]) -> tuple[np.ndarray, list[np.ndarray] | None]:
        # Not inference_mode: quanto's tensors are autograd functions that save what they read.
        with torch.no_grad():
            found = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        return found.logits[0].float().numpy(), [layer[0].float().numpy() for layer in found.hidden_states]

    return forward


def load_model(folder: str) -> Any:
    """The model itself, as quanto's loader makes it."""
    from optimum.quanto import QuantizedModelForCausalLM

    if os.environ.get("QUANTLAB_QUANTO_COMPILES") != "1":
        _unpack_here()
    model: Any = QuantizedModelForCausalLM.from_pretrained(folder)
    for module in model.modules():
        codes = getattr(getattr(module, "weight", None), "_data", None)
        if type(codes) is torch.Tensor and codes.dtype == torch.int8:
            module.weight._data = codes.clone()
    _loaded["dtype"] = str(model.dtype).removeprefix("torch.")
    return model


def _unpack_here() -> None:
    """Give quanto's extension the one function that it has, before it is compiled."""
    from optimum.quanto.library.extensions.cpp import ext

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([packed >> place & 2**bits - 1 for place in range(0, 8, bits)])

    ext._lib = ext._lib or SimpleNamespace(unpack=unpack)
