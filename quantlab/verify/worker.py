"""One engine in a process of its own: `python worker.py ENGINE.py FOLDER REQUEST.npz ANSWER.npz`.

Stands alone: it imports numpy and the engine's file, and never quantlab, so that it runs in any environment.

Request (npz)
    row_ids, row_lengths       int64: rows of tokens, one behind the other, and their lengths
    row_starts                 int64: place in each row from which tokens are scored
    probe_ids, probe_lengths   int64: rows whose logits and hidden states are asked for
Answer (npz)
    ll                         float64 [rows]: log-likelihood of each row's scored tokens, nats
    logits_P                   float32 [T, V] of probe P
    hidden_P_L                 float32 [T, D]: output of the embedding (L = 0) and of each layer; absent where the
                               engine does not tell
    facts                      JSON text: versions, arithmetic, peak_bytes, load_s, run_s

An engine's file offers VERSIONS() -> dict[str, str], load(folder) -> forward, and may offer ARITHMETIC, a text or a
function without arguments that is asked after loading: one of `ARITHMETICS` in simulated.py.
forward(ids: list[int]) -> (logits float32 [T, V], list of hidden [T, D] or None).

T tokens, V vocabulary, D hidden size.
"""

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def main(arguments: list[str]) -> None:
    """Load, run, answer."""
    engine_file, folder, request_file, answer_file = arguments
    # This file's folder must not shadow the engine's own modules.
    sys.path[:] = sys.path[1:]
    engine = _module(engine_file)
    began = time.monotonic()
    forward = engine.load(folder)
    loaded = time.monotonic()
    with np.load(request_file, allow_pickle=False) as request:
        answer = respond(forward, dict(request))
    arithmetic = getattr(engine, "ARITHMETIC", "")
    facts = {
        "versions": engine.VERSIONS(),
        "arithmetic": arithmetic() if callable(arithmetic) else arithmetic,
        "peak_bytes": _peak_bytes(),
        "load_s": loaded - began,
        "run_s": time.monotonic() - loaded,
    }
    with Path(answer_file).open("wb") as file:
        np.savez(file, facts=np.array(json.dumps(facts)), **answer)


def respond(forward: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The arrays of an answer."""
    rows = split(request["row_ids"], request["row_lengths"])
    ll = [
        loglikelihood(forward, ids, start)
        for ids, start in zip(rows, request["row_starts"].tolist(), strict=True)
    ]
    answer: dict[str, Any] = {"ll": np.array(ll, dtype=np.float64)}
    for place, ids in enumerate(split(request["probe_ids"], request["probe_lengths"])):
        logits, hidden = forward(ids)
        answer[f"logits_{place}"] = np.asarray(logits, dtype=np.float32)
        for layer, states in enumerate(hidden or ()):
            answer[f"hidden_{place}_{layer}"] = np.asarray(states, dtype=np.float32)
    return answer


def loglikelihood(forward: Any, ids: list[int], start: int) -> float:
    """Sum over the tokens from `start` on of their log softmax, in float64."""
    logits = np.asarray(forward(ids[:-1])[0])[start - 1 :].astype(np.float64)
    highest = logits.max(axis=-1)
    logsum = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=-1))
    return float((logits[np.arange(len(logits)), ids[start:]] - logsum).sum())


def split(ids: Any, lengths: Any) -> list[list[int]]:
    """Rows that lie one behind the other, as lists."""
    if not len(lengths):
        return []
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


def _peak_bytes() -> int:
    """Of this process alone: what getrusage says holds its parent's too. 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _module(file: str) -> Any:
    spec = importlib.util.spec_from_file_location("quantlab_reader", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(sys.argv[1:])
