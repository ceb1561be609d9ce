"""bitsandbytes for the tests that compare with it; they are skipped where it is not installed."""

import logging
import warnings
from typing import Any

import pytest


def load() -> Any:
    """The module, imported without its deprecation warnings and silent about its casts to float16."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("bitsandbytes")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return module
