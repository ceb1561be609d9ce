"""Scores that were measured on exactly the weights of a folder."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from quantlab.records import Record
from quantlab.schemes import Scheme

__all__ = ["METRICS", "SIZES", "Scores", "matching_scores"]

Scores = Mapping[str, tuple[Record, Mapping[str, Any]]]
"""Task -> the record that measured it, and the task's summary in its result."""

SIZES = {"hellaswag": "n", "perplexity": "num_tokens"}
"""Task -> what counts its items."""
METRICS = {"hellaswag": ("acc", "acc_norm"), "perplexity": ("nats_per_token", "perplexity")}
"""Task -> scores on the card; each has its interval beside it as `<score>_interval`."""
_MAKES_CODES = ("calibration", "method", "transforms", "widths")
"""Entries of a record's `made_by` that codes depend on."""


def matching_scores(
    records: Sequence[Record],
    content_hash: str,
    scheme: Scheme,
    skip: Sequence[str] = (),
    made_by: Mapping[str, Any] = MappingProxyType({}),
) -> Scores:
    """Of each task the largest evaluation that was made of exactly these weights, and of items enough for an interval.

    Args:
        made_by: what a record says of calibration, method, transforms and widths, where the scheme has them.
    """
    best: dict[str, tuple[Record, Mapping[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record.key):
        if record.kind != "evaluation" or not _is_of(record.made_by, content_hash, scheme, skip, made_by):
            continue
        for task, size in SIZES.items():
            summary = record.result.get(task)
            if (
                summary
                and _has_intervals(task, summary)
                and (task not in best or summary[size] > best[task][1][size])
            ):
                best[task] = record, summary
    return best


def _has_intervals(task: str, summary: Mapping[str, Any]) -> bool:
    return None not in summary[f"{METRICS[task][0]}_interval"]


def _is_of(
    recorded: Mapping[str, Any],
    content_hash: str,
    scheme: Scheme,
    skip: Sequence[str],
    made_by: Mapping[str, Any],
) -> bool:
    skipped = recorded.get("quantize", {}).get("skip", ())
    return (
        recorded.get("checkpoint", {}).get("content_hash") == content_hash
        and recorded.get("scheme") == scheme.name
        and sorted(skipped) == sorted(skip)
        and all(recorded.get(name) == made_by.get(name) for name in _MAKES_CODES)
    )
