"""An engine started in a fresh process, held to limits of time and memory; whatever it does, the caller goes on."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantlab.verify.config import VerifyConfig
from quantlab.verify.questions import Request

__all__ = ["Answer", "ReaderError", "ask", "parsed"]

WORKER = Path(__file__).with_name("worker.py")
_POLL_S = 0.1
_MAX_REASON = 300
_LOG_BYTES = 65_536
"""The end of what an engine wrote, in which its last line is looked for."""
_SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # What is certified is this machine's CPU.
    "CUDA_VISIBLE_DEVICES": "",
    # gptqmodel needs two workers, however few the cores.
    "GPTQMODEL_CPU_WORKERS": "2",
}


class ReaderError(Exception):
    """An engine that gave no answer; the text says why."""


@dataclass(frozen=True)
class Answer:
    """What an engine found."""

    ll: NDArray[np.float64]
    """[rows], nats."""
    logits: tuple[NDArray[np.float32], ...]
    """[T, V] of each probe."""
    hidden: tuple[tuple[NDArray[np.float32], ...], ...] | None
    """Of each probe the output of the embedding and of each layer, [T, D]; none where the engine does not tell."""
    versions: Mapping[str, str]
    arithmetic: str
    """What it says that it computes in; empty where it does not say."""
    peak_bytes: int = 0
    load_s: float = 0.0
    run_s: float = 0.0


def ask(engine_file: Path, python: Path, folder: Path, request: Request, config: VerifyConfig) -> Answer:
    """Start the engine on the folder and wait for its answer.

    Raises:
        ReaderError: it crashed, took too long or too much memory, or its answer is not one.
    """
    with tempfile.TemporaryDirectory(prefix="quantlab-verify-") as name:
        room = Path(name)
        request.save(room / "request.npz")
        files = [engine_file, folder.resolve(), room / "request.npz", room / "answer.npz"]
        command = [str(python.absolute()), str(WORKER), *map(str, files)]
        with (room / "log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=room,
                env=_environment(python, config.threads),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                code = _wait(process, config)
            finally:
                _end(process)
        if code != 0:
            raise ReaderError(_why(code, room / "log", folder))
        return _read(room / "answer.npz", request)


def parsed(arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any], request: Request) -> Answer:
    """Arrays of an answer, once they have the shapes that were asked for.

    Raises:
        ReaderError: they do not.
    """
    try:
        logits = tuple(arrays[f"logits_{place}"] for place in range(len(request.probes)))
        hidden = tuple(_hidden(arrays, place) for place in range(len(request.probes)))
        versions = {str(name): str(version) for name, version in facts["versions"].items()}
        answer = Answer(
            arrays["ll"],
            logits,
            hidden if all(hidden) else None,
            versions,
            str(facts["arithmetic"]),
            int(facts["peak_bytes"]),
            float(facts["load_s"]),
            float(facts["run_s"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReaderError(f"its answer is not one: {error!r}") from error
    found = [[of_probe, *states] for of_probe, states in zip(logits, hidden, strict=True)]
    same_layers = len({len(states) for states in hidden}) == 1
    right = (
        same_layers
        and answer.ll.shape == (len(request.rows),)
        and all(
            array.dtype == np.float32 and array.ndim == 2 and len(array) == len(ids)
            for ids, arrays_of_probe in zip(request.probes, found, strict=True)
            for array in arrays_of_probe
        )
    )
    if not right:
        raise ReaderError("its answer has other shapes than what was asked")
    return answer


def _hidden(arrays: Mapping[str, NDArray[Any]], place: int) -> tuple[NDArray[np.float32], ...]:
    count = sum(name.startswith(f"hidden_{place}_") for name in arrays)
    return tuple(arrays[f"hidden_{place}_{layer}"] for layer in range(count))


def _read(path: Path, request: Request) -> Answer:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        facts = json.loads(str(arrays.pop("facts")))
    # Whatever a damaged zip or array makes numpy raise.
    except Exception as error:
        raise ReaderError(f"its answer cannot be read: {type(error).__name__}") from error
    return parsed(arrays, facts, request)


def _environment(python: Path, threads: int) -> dict[str, str]:
    numbers = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    environment = os.environ | _SETTINGS | numbers
    if python != Path(sys.executable):
        # Our modules are not for another environment.
        environment.pop("PYTHONPATH", None)
    return environment


def _wait(process: "subprocess.Popen[bytes]", config: VerifyConfig) -> int:
    """The exit code, unless a limit is passed first."""
    limit = config.memory_bytes or _free_bytes() * 9 // 10
    ends = monotonic() + config.timeout_s
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(_POLL_S)
        if monotonic() > ends:
            raise ReaderError(f"it took more than {config.timeout_s:g} s")
        if limit and (held := _resident_bytes(process.pid)) > limit:
            raise ReaderError(f"it held {held:,} bytes of memory, more than the {limit:,} allowed")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Nothing that the engine started outlives it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _why(code: int, log: Path, folder: Path) -> str:
    """How it ended and the last line that it wrote, without places of this machine."""
    known = {each.value: each.name for each in signal.Signals}
    ended = f"it was ended by {known.get(-code, -code)}" if code < 0 else f"it ended with code {code}"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_BYTES))
        lines = file.read().decode("utf-8", errors="replace").strip().splitlines()
    last = " ".join(lines[-1].split()) if lines else "it wrote nothing"
    return f"{ended}: {last.replace(str(folder.resolve()), folder.name)}"[:_MAX_REASON]


def _resident_bytes(pid: int) -> int:
    with suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _free_bytes() -> int:
    """Memory that is free on this machine; 0 where it cannot be told."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
    return 0
