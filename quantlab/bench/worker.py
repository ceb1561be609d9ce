"""One engine on one checkpoint, measured in this process.

    python -m quantlab.bench.worker REQUEST.json ANSWER.json

REQUEST: engine, path, prompt_tokens, new_tokens, threads, clock. ANSWER: `run`, a `results.Run`, `versions` and
`arithmetic`; or `error`, a sentence, where the engine cannot. Tokens are random, and the same for every engine: which
they are changes no time. The first prompt warms up and is not counted.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from quantlab.bench.engines import LOADERS, Engine, versions
from quantlab.errors import UserError

__all__ = ["measure"]


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Load, warm up, measure."""
    began = perf_counter()
    name, num_prompt, num_new = request["engine"], request["prompt_tokens"], request["new_tokens"]
    for package in ("llama_cpp",) if name == "llama_cpp" else ("torch", "transformers"):
        __import__(package)
    libraries = _resident("VmRSS")
    engine = LOADERS[name](Path(request["path"]), num_prompt + num_new, request["threads"])
    ids = _tokens(num_prompt + num_new, engine.num_entries)
    engine.start(ids[:num_prompt])
    engine.step(ids[num_prompt])
    load_s = perf_counter() - began
    clock = perf_counter if request["clock"] == "wall" else lambda: process_time() / request["threads"]
    first_s, decode_s = _timed(engine, ids, num_prompt, clock)
    run = {
        "prompt_tokens": num_prompt,
        "new_tokens": engine.num_read() - num_prompt + 1,
        "load_s": load_s,
        "first_token_s": first_s,
        "decode_s": decode_s,
        "peak_bytes": _resident("VmHWM"),
        "libraries_bytes": libraries,
    }
    return {"run": run, "versions": versions(name), "arithmetic": engine.arithmetic}


def _timed(
    engine: Engine, ids: list[int], num_prompt: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds to the first new token's logits, and from there to the last one's."""
    began = clock()
    engine.start(ids[:num_prompt])
    first = clock()
    for token in ids[num_prompt:-1]:
        engine.step(token)
    return first - began, clock() - first


def _tokens(count: int, num_entries: int) -> list[int]:
    """The same tokens wherever the vocabulary is as large."""
    import numpy as np

    return [int(token) for token in np.random.default_rng(0).integers(0, num_entries, count)]


def _resident(field: str) -> int:
    """Resident memory now (VmRSS) or at most (VmHWM), of this process alone.

    Not getrusage: its peak counts what the parent process held before this one was started.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise UserError(f"memory must be told by /proc/self/status: it has no {field}. Bench on Linux.")


def _sentence(error: Exception) -> str:
    """Our errors as they are; of others the kind and the first line, which says most."""
    if isinstance(error, UserError):
        return str(error)
    first = next(filter(None, map(str.strip, str(error).splitlines())), "it says no more")
    return f"{type(error).__name__}: {first}"


def main() -> None:
    request, answer = (Path(argument) for argument in sys.argv[1:])
    try:
        said = measure(json.loads(request.read_text(encoding="utf-8")))
    # Whatever an engine raises is its reason.
    except Exception as error:
        said = {"error": _sentence(error)}
    answer.write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    main()
