"""Intervals of text scores on stored blocks of SmolLM2: they hold the score of the population as often as they say."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "text_intervals.py"


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    """The benchmark that makes the table of docs/measurements.md."""
    spec = importlib.util.spec_from_file_location("text_intervals", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("score", [0, 1], ids=["nats", "change"])
@pytest.mark.parametrize(
    ("kind", "size"), [("drawn", 16), ("drawn", 64), ("drawn", 256), ("neighbours", 256)]
)
def test_intervals_cover_as_often_as_they_say(
    simulation: ModuleType, score: int, kind: str, size: int
) -> None:
    """95%, of 500 samples of one seed: a standard error of one point, and an interval that is an approximation."""
    effective, by_block, by_document = simulation.coverage(simulation.stored()[score], kind, size, 500)
    assert 0.92 <= by_document <= 0.98, f"{by_document:.3f}"
    if size == 256:
        assert effective > 12
        assert by_block < 0.85, "with blocks as units they would cover less"


@pytest.mark.parametrize("score", [0, 1], ids=["nats", "change"])
def test_runs_over_few_documents_say_that_their_spread_is_hardly_known(
    simulation: ModuleType, score: int
) -> None:
    """16 blocks in a row are of two documents; their intervals cover 0.65 to 0.85, better than blocks as units do."""
    effective, by_block, by_document = simulation.coverage(simulation.stored()[score], "neighbours", 16, 500)
    assert effective < 5
    assert by_block < by_document < 0.92
