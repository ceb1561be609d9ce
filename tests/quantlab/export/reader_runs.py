"""Engines of other environments on exported folders: their logits, and how far off they may be.

T tokens, V vocabulary.
"""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from quantlab.reading.raw import RawFolder
from quantlab.reading.readers import decoder_of
from quantlab.verify.config import VerifyConfig
from quantlab.verify.process import WORKER
from quantlab.verify.readers import engine_file, python_of

PROBE = np.random.default_rng(0).integers(1, 512, 40)
"""Tokens that are asked for."""


def needs_reader(engine: str, form: str) -> pytest.MarkDecorator:
    """Skips where the environment of the engine is not built."""
    absent = python_of(engine, form, VerifyConfig()) is None
    return pytest.mark.skipif(absent, reason=f"needs the environment of {engine}: make readers")


def run(engine: str, form: str, folder: Path, scratch: Path) -> subprocess.CompletedProcess[str]:
    """The engine on a folder; its answer is scratch/answer.npz."""
    nothing = np.zeros(0, dtype=np.int64)
    np.savez(
        scratch / "request.npz",
        row_ids=nothing,
        row_lengths=nothing,
        row_starts=nothing,
        probe_ids=PROBE,
        probe_lengths=np.array([len(PROBE)]),
    )
    python = python_of(engine, form, VerifyConfig())
    command = [python, WORKER, engine_file(engine), folder, scratch / "request.npz", scratch / "answer.npz"]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def logits_of(engine: str, form: str, folder: Path, scratch: Path) -> NDArray[np.float64]:
    """What the engine answers, [T, V]."""
    finished = run(engine, form, folder, scratch)
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-4000:]
    with np.load(scratch / "answer.npz", allow_pickle=False) as answer:
        logits: NDArray[np.float64] = answer["logits_0"].astype(np.float64)
    return logits


def dense_logits(source: Path, folder: Path, dtype: torch.dtype) -> NDArray[np.float64]:
    """Logits [T, V] of a plain model of the dtype that holds the folder's dequantized weights."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    raw = RawFolder(folder)
    decoder = decoder_of(raw)
    for name in decoder.linears(raw):
        model.get_submodule(name).weight.data = torch.from_numpy(decoder.decode(raw, name).real()).double()
    # Buffers stay as they are: frequencies of positions need float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    with torch.no_grad():
        logits: torch.Tensor = model(torch.from_numpy(PROBE)[None]).logits[0]
    return logits.double().numpy()


def assert_close(found: NDArray[np.float64], source: Path, folder: Path, dtype: torch.dtype) -> None:
    """The largest and the mean error against float64 are at most twice those of plain torch in the engine's dtype."""
    exact = dense_logits(source, folder, torch.float64)
    plain = np.abs(dense_logits(source, folder, dtype) - exact)
    error = np.abs(found - exact)
    assert error.max() <= 2 * plain.max(), f"{error.max():.3e} where plain torch has {plain.max():.3e}"
    assert error.mean() <= 2 * plain.mean(), f"{error.mean():.3e} where plain torch has {plain.mean():.3e}"
