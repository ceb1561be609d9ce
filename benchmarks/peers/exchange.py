"""What peers start from and what they leave, in runs/peers; needs numpy, torch and safetensors only.

smollm2/                        float32 checkpoint in Hugging Face format
calibration.npy                 token ids [N, T], int64
RESULT/weights.safetensors      every tensor of the decoder layers, float32, linears dequantized, [O, I]
RESULT/settings.json            who made them, and how
"""

import json
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

OUT = Path(__file__).resolve().parents[2] / "runs" / "peers"
SMOLLM2 = OUT / "smollm2"


def calibration(num_sequences: int) -> NDArray[np.int64]:
    """The first blocks of the calibration set, [N, T]."""
    ids_NT: NDArray[np.int64] = np.load(OUT / "calibration.npy")
    return ids_NT[:num_sequences]


class Stopwatch:
    """CPU and wall seconds since it was made; CPU seconds are those of all threads of this process."""

    def __init__(self) -> None:
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def seconds(self) -> dict[str, float]:
        return {
            "cpu_s": round(time.process_time() - self._cpu, 1),
            "wall_s": round(time.perf_counter() - self._wall, 1),
        }


def leave(name: str, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> None:
    """Write one result; settings need method, library, bits and storage_bits (bits a weight, scales included)."""
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    plain = {key: tensor.detach().float().contiguous() for key, tensor in tensors.items()}
    save_file(plain, folder / "weights.safetensors")
    made = {"version": version(settings["library"]), "torch": torch.__version__}
    (folder / "settings.json").write_text(json.dumps({**settings, **made}, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(f"{folder} {json.dumps(settings)}\n")
