"""The engine matrix of a folder: every engine that loads it here is started and compared with our simulated model."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from quantlab.evaluation.hellaswag import evaluate_hellaswag
from quantlab.evaluation.tasks import sharing
from quantlab.export.engines import Engine
from quantlab.models.loading import Checkpoint
from quantlab.schemes import Scheme
from quantlab.verify.agreement import compare
from quantlab.verify.certificate import Row, State, unread
from quantlab.verify.config import VerifyConfig
from quantlab.verify.process import Answer, ReaderError, ask
from quantlab.verify.questions import make_request
from quantlab.verify.readers import arithmetic_of, engine_file, python_of
from quantlab.verify.simulated import ARITHMETICS, forward_of, load_simulated, reference_of
from quantlab.verify.sources import Source
from quantlab.verify.worker import respond

__all__ = ["Matrix"]


class Matrix:
    """Our model of the folder, what is asked of every engine, and the rows.

    Raises:
        CheckpointError: the folder does not hold exactly its model.
        DataError, EvaluationError: the documents cannot be used, or not with this tokenizer.
    """

    def __init__(
        self, folder: Path, source: Source, scheme: Scheme, format_name: str, config: VerifyConfig
    ) -> None:
        self._folder, self._source, self._config = folder, source, config
        self._scheme, self._format = scheme, format_name
        ours = load_simulated(folder, source)
        self.request = make_request(ours.tokenizer, config, ours.info.vocab_size)
        self._ours = self._answered("float32", ours.model, self._scored(ours))
        # Kept by arithmetic: engines of one folder mostly share it.
        self._plain: Callable[[str], Answer] = cache(self._in_arithmetic)

    def row(self, engine: Engine, advance: Callable[[int], object]) -> Row:
        """Start the engine, if it loads here and was asked for, and compare."""
        asked = self._config.engines is None or engine.name in self._config.engines
        if engine.loads != "here" or not asked:
            return unread(engine)
        python = python_of(engine.name, self._format, self._config)
        file = engine_file(engine.name)
        if python is None or not file.exists():
            return Row(engine, "not run", "its environment is not there: run `make readers`")
        try:
            answer = ask(file, python, self._folder, self.request, self._config)
            return self._compared(engine, answer)
        except ReaderError as fault:
            return Row(engine, "failed", str(fault))
        finally:
            advance(1)

    def _compared(self, engine: Engine, answer: Answer) -> Row:
        arithmetic = answer.arithmetic or arithmetic_of(engine.name, self._format, self._scheme)
        if arithmetic not in ARITHMETICS:
            raise ReaderError(f"it computes in {arithmetic!r}, which nothing here can be compared with")
        reference, plain = self._plain(reference_of(arithmetic)), self._plain(arithmetic)
        found = compare(answer, arithmetic, self._ours, reference, plain, self.request)
        reason = (
            "" if found.agrees else f"gaps are beyond what {arithmetic} explains: {_places(found.beyond)}"
        )
        seconds = answer.load_s + answer.run_s
        state: State = "agrees" if found.agrees else "disagrees"
        return Row(engine, state, reason, answer.versions, found, answer.peak_bytes, seconds)

    def _in_arithmetic(self, name: str) -> Answer:
        """Our model's probes; rows are scored only in float32, which predictions are compared with."""
        if name == "float32":
            return self._ours
        return self._answered(name, load_simulated(self._folder, self._source, name).model, np.zeros(0))

    def _scored(self, ours: Checkpoint) -> NDArray[np.float64]:
        """Log-likelihoods of all endings, as `quantlab evaluate` finds them: a context is read once where it may be."""
        found = evaluate_hellaswag(
            ours.model,
            ours.tokenizer,
            self._config.hellaswag,
            share_context=sharing(ours, self._scheme)[0],
            batch_size=1 if self._scheme.rounds_values else "auto",
        )
        return found.ll_N4.reshape(-1)

    def _answered(self, name: str, model: PreTrainedModel, ll: NDArray[np.float64]) -> Answer:
        nothing = np.zeros(0, dtype=np.int64)
        rows = {"row_ids": nothing, "row_lengths": nothing, "row_starts": nothing}
        found = respond(forward_of(model), self.request.arrays() | rows)
        probes = range(len(self.request.probes))
        hidden = tuple(
            tuple(found[f"hidden_{place}_{layer}"] for layer in range(_num_hidden(found))) for place in probes
        )
        return Answer(ll, tuple(found[f"logits_{place}"] for place in probes), hidden, {}, name)


def _num_hidden(found: dict[str, Any]) -> int:
    return sum(name.startswith("hidden_0_") for name in found)


def _places(beyond: tuple[str, ...]) -> str:
    return beyond[0] + (f" and {len(beyond) - 1} more places" if len(beyond) > 1 else "")
