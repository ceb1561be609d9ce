"""One side of a bench in a fresh process; whatever it does, the bench goes on."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import quantlab
from quantlab.bench.config import BenchConfig
from quantlab.bench.results import Run

__all__ = ["EngineError", "run_once"]

_MAX_REASON = 300
_SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # What is measured is this machine's CPU.
    "CUDA_VISIBLE_DEVICES": "",
}


class EngineError(Exception):
    """An engine that gave no measurement; the text says why."""


def run_once(engine: str, path: Path, config: BenchConfig) -> tuple[Run, dict[str, str], str]:
    """Measure an engine on a path in a process of its own; also versions of its packages, and its arithmetic.

    Raises:
        EngineError: it failed, took too long, or counted other tokens than were asked for.
    """
    request = {
        "engine": engine,
        "path": str(path.resolve()),
        "prompt_tokens": config.prompt_tokens,
        "new_tokens": config.new_tokens,
        "threads": config.threads,
        "clock": config.clock,
    }
    answer = _ask(request, config)
    if "error" in answer:
        raise EngineError(answer["error"])
    run = Run(**answer["run"])
    if (run.prompt_tokens, run.new_tokens) != (config.prompt_tokens, config.new_tokens):
        raise EngineError(
            f"tokens must be counted exactly: {engine} read {run.prompt_tokens} and {run.new_tokens}, not "
            f"{config.prompt_tokens} and {config.new_tokens}."
        )
    return run, answer["versions"], answer["arithmetic"]


def _ask(request: dict[str, Any], config: BenchConfig) -> dict[str, Any]:
    """The worker's answer."""
    with tempfile.TemporaryDirectory(prefix="quantlab-bench-") as name:
        room = Path(name)
        (room / "request.json").write_text(json.dumps(request), encoding="utf-8")
        # -P: no module is taken from wherever the user happens to stand.
        command = [sys.executable, "-P", "-m", "quantlab.bench.worker", "request.json", "answer.json"]
        with (room / "log").open("wb") as log:
            try:
                done = subprocess.run(
                    command,
                    cwd=room,
                    env=_environment(config.threads),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    timeout=config.timeout_s,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise EngineError(f"it took more than {config.timeout_s:g} s.") from error
        if done.returncode != 0 or not (room / "answer.json").exists():
            raise EngineError(_why(done.returncode, room / "log"))
        answer: dict[str, Any] = json.loads((room / "answer.json").read_text(encoding="utf-8"))
        return answer


def _environment(threads: int) -> dict[str, str]:
    numbers = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    home = str(Path(quantlab.__file__).resolve().parents[1])
    paths = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH", ""))))
    return os.environ | _SETTINGS | numbers | {"PYTHONPATH": paths}


def _why(code: int, log: Path) -> str:
    """How it ended, and the last line that it wrote."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = " ".join(lines[-1].split()) if lines else "it wrote nothing"
    return f"it ended with code {code}: {last}"[:_MAX_REASON]
