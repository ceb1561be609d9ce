"""`quantlab list`."""

import pytest

from quantlab.cli.verbs.list import Topic
from tests.quantlab.cli.command import quantlab, result_of


@pytest.mark.parametrize("topic", list(Topic))
def test_list_has_one_line_each(topic: Topic, capsys: pytest.CaptureFixture[str]) -> None:
    names = result_of(capsys, "list", topic)
    code, out, _ = quantlab(capsys, "list", topic)
    assert code == 0 and len(out.splitlines()) == len(names) and all(names.values())
