"""The key follows from all inputs, and from nothing else."""

import pytest

from quantlab.records import Record, record_key
from tests.quantlab.records.toy_records import CONFIG, MADE_BY, record


def test_the_key_follows_from_all_inputs_and_not_from_results():
    keys = [
        record_key("evaluation", MADE_BY),
        record_key("profile", MADE_BY),
        *(record_key("evaluation", MADE_BY | {name: "other"}) for name in MADE_BY),
    ]
    assert len(set(keys)) == len(keys)
    assert record({"acc": 1}).key == record({"acc": 2}).key
    assert record_key("evaluation", dict(reversed(MADE_BY.items()))) == keys[0]


def test_what_is_hashed_must_be_finite():
    with pytest.raises(ValueError, match="not JSON compliant"):
        Record.of("profile", {"x": float("nan")}, CONFIG, {})
