"""The command line against the corpus: refused in one sentence, at once, in little memory, with nothing run.

Every case is opened by quantlab's own command line in a forked child of a server (server.py). Cases that names,
headers and configs give away run where torch was never imported: their seconds and memory are the whole child's. Cases
that only loading gives away run in children of a server that has loaded a good checkpoint once: the seconds to import
torch and transformers and the memory they hold are left out. The first cases of every class always run, the rest are
`slow`.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.bases import make_bases
from tests.hostile.case import Case
from tests.hostile.corpus import CASES, CLASSES, NOT_LOADED, first_of_each
from tests.hostile.runner import Outcome, Server, faults, serving
from tests.hostile.verbs import words_of


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The good checkpoints."""
    return make_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def light() -> Iterator[Server]:
    """Without torch."""
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def heavy(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With torch, after a good checkpoint was loaded."""
    words = words_of("profile", bases / "llama", bases, tmp_path_factory.mktemp("warm"))
    with serving(words) as server:
        yield server


FAST = first_of_each(CASES)


def marked(*, loads: bool) -> list[Any]:
    """The cases that are told so, all but the first of each class marked slow."""
    return [
        pytest.param(case, id=case.name, marks=() if case.name in FAST else pytest.mark.slow)
        for case in CASES
        if case.loads == loads
    ]


def attempt(case: Case, server: Server, bases: Path, place: Path) -> Outcome:
    path = case.make(bases, place)
    return server.run(words_of(case.verb, path, bases, place / "work"), torch=case.loads)


@pytest.mark.parametrize("case", marked(loads=False))
def test_refused_before_torch_is_imported(case: Case, light: Server, bases: Path, tmp_path: Path) -> None:
    assert faults(attempt(case, light, bases, tmp_path), tmp_path, bases, case.says) == []


@pytest.mark.parametrize("case", marked(loads=True))
def test_refused_or_accepted_by_loading(case: Case, heavy: Server, bases: Path, tmp_path: Path) -> None:
    assert faults(attempt(case, heavy, bases, tmp_path), tmp_path, bases, case.says) == []


def test_the_corpus_covers_every_class_that_applies_to_loading() -> None:
    bad = [case for case in CASES if not case.good]
    counts = Counter(name for case in CASES for name in case.classes.split())
    fast = Counter(name for case in CASES if case.name in FAST for name in case.classes.split())
    assert len(bad) >= 600
    assert len({case.name for case in CASES}) == len(CASES)
    assert set(counts) == set(CLASSES) and not set(counts) & set(NOT_LOADED)
    assert min(counts.values()) >= 3, counts
    assert set(fast) == set(counts) and min(fast.values()) >= 3, fast
