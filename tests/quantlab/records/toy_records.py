"""A record with invented results."""

import numpy as np

from quantlab.records import Record

MADE_BY = {"checkpoint": "ab12", "scheme": "w4g64", "seeds": (0, 1)}
CONFIG = {"name": "toy", "limit": 3}
SIDECAR = {"host": "here", "seconds": 1.5}


def scores(shift: float = 0.0) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {
        "hellaswag": {
            "item": np.arange(3),
            "correct": np.array([True, False, True]),
            "margin": rng.normal(size=3) + shift,
        },
        "perplexity": {"item": np.arange(2), "nats": rng.gamma(5, size=2)},
    }


def record(result: dict | None = None, made_by: dict | None = None) -> Record:
    return Record.of("evaluation", made_by or MADE_BY, CONFIG, result or {"hellaswag": {"acc": 0.5, "n": 3}})
