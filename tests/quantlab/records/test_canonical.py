"""Values of Python and numpy as plain data."""

from pathlib import Path

import numpy as np
import pytest

from quantlab.records import plain


def test_plain_data_knows_numpy_paths_and_integer_keys():
    value = {
        16: np.float64(0.5),
        "p": Path("a/b"),
        "t": (np.int8(3), np.array([[1, 2]])),
        "b": np.bool_(True),
    }
    assert plain(value) == {"16": 0.5, "p": "a/b", "t": [3, [[1, 2]]], "b": True}
    with pytest.raises(AssertionError, match="one text"):
        plain({1: "a", "1": "b"})
    with pytest.raises(AssertionError, match="not plain data: set"):
        plain({"s": {1}})
