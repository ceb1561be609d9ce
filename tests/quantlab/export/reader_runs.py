"""Engines of other environments on exported folders: their logits, and how far off they may be.

T tokens, V vocabulary.
"""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from quantlab.reading.raw import RawFolder
from quantlab.reading.readers import decoder_of
from quantlab.verify.config import VerifyConfig
from quantlab.verify.readers import engine_file, python_of

PROBE = np.random.default_rng(0).integers(1, 512, 40)
"""Tokens that are asked for."""


_DRIVER = """
import importlib.util, sys
from pathlib import Path
import numpy as np
import torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("reader", sys.argv[1])
engine = importlib.util.module_from_spec(spec)
spec.loader.exec_module(engine)
scratch = Path(sys.argv[2])
ids = np.load(scratch / "ids.npy").tolist()
for folder in sys.argv[3:]:
    try:
        np.save(scratch / f"{Path(folder).name}.npy", engine.load(folder)(ids)[0])
    except Exception as error:
        (scratch / f"{Path(folder).name}.txt").write_text(f"{type(error).__name__}: {error}")
"""


def needs_reader(engine: str, form: str) -> pytest.MarkDecorator:
    """Skips where the environment of the engine is not built."""
    absent = python_of(engine, form, VerifyConfig()) is None
    return pytest.mark.skipif(absent, reason=f"needs the environment of {engine}: make readers")


def answers(
    engine: str, form: str, folders: Sequence[Path], scratch: Path
) -> dict[str, NDArray[np.float64] | str]:
    """By name of folder what the engine answers, [T, V], or why it does not; all of them in one process."""
    python = python_of(engine, form, VerifyConfig())
    np.save(scratch / "ids.npy", PROBE)
    command = [python, "-c", _DRIVER, engine_file(engine), scratch, *folders]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env=environment
    )
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-4000:]
    found: dict[str, NDArray[np.float64] | str] = {}
    for folder in folders:
        answer = scratch / f"{folder.name}.npy"
        reason = scratch / f"{folder.name}.txt"
        found[folder.name] = np.load(answer).astype(np.float64) if answer.exists() else reason.read_text()
    return found


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


def assert_close(found: NDArray[np.float64] | str, source: Path, folder: Path, dtype: torch.dtype) -> None:
    """The largest and the mean error against float64 are at most twice those of plain torch in the engine's dtype."""
    assert not isinstance(found, str), found
    exact = dense_logits(source, folder, torch.float64)
    plain = np.abs(dense_logits(source, folder, dtype) - exact)
    error = np.abs(found - exact)
    assert error.max() <= 2 * plain.max(), f"{error.max():.3e} where plain torch has {plain.max():.3e}"
    assert error.mean() <= 2 * plain.mean(), f"{error.mean():.3e} where plain torch has {plain.mean():.3e}"
