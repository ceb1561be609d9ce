"""Whether texts and HellaSwag files are still what a key was made of: their bytes are read again, a few MB."""

from quantlab.config import RunConfig
from quantlab.data.hellaswag import read_rows
from quantlab.data.sources import digest
from quantlab.data.text import check_text
from quantlab.errors import DataError

__all__ = ["check_data"]


def check_data(config: RunConfig, task: str, sha256: str) -> None:
    """Refuse data of a task that is not of this SHA-256.

    Raises:
        DataError: it is not, or cannot be read.
    """
    path, found = _found(config, task)
    if found != sha256:
        raise DataError(
            f"data must stay as it is while it is worked on: {path} has other bytes than when the run began. Nothing "
            "was recorded of it since; run again once nothing writes there."
        )


def _found(config: RunConfig, task: str) -> tuple[object, str]:
    """Place of a task's data, and its SHA-256 now."""
    assert config.evaluation is not None or task in ("profile", "calibration")
    if task == "hellaswag":
        assert config.evaluation is not None
        path = config.evaluation.hellaswag.path
        return path, digest(read_rows(path))
    if task == "profile":
        assert config.profile is not None
        text = config.profile.text
    elif task == "calibration":
        text = config.calibration.text
    else:
        assert config.evaluation is not None
        text = config.evaluation.perplexity
    return text.path, check_text(text)
