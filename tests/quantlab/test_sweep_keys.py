"""What a cell's key says of how it is computed: what can move its last digits, and nothing else."""

from pathlib import Path
from typing import Any

import pytest

from quantlab import checks
from quantlab.config import build_config
from quantlab.records import COMPUTATION, measured_on, what_was_computed
from quantlab.sweep.jobs import Job, jobs_of

EVALUATION = {"hellaswag": {"limit": 3}, "perplexity": {"sequence_length": 40, "num_sequences": 2}}


def _job(folder: Path, scheme: str, kind: str = "evaluation", **changes: Any) -> Job:
    """A cell of a run on the toy, with `section__key=value` changed."""
    tree: dict[str, Any] = {
        "checkpoints": [{"path": str(folder)}],
        "schemes": [scheme],
        "evaluation": EVALUATION,
    }
    overrides = [f"{name.replace('__', '.')}={value}" for name, value in changes.items()]
    config = build_config(tree, overrides)
    found = [
        j for j in jobs_of(config, *checks.check(config)) if (j.cell.kind, j.cell.scheme) == (kind, scheme)
    ]
    return found[0]


@pytest.mark.parametrize(
    ("scheme", "moved_by"),
    [
        ("w16", {"sweep.threads", "evaluation.batch_size"}),
        ("w4g32", {"sweep.threads", "evaluation.batch_size"}),
        ("w4g32-gptq", {"sweep.threads", "evaluation.batch_size", "calibration.batch_size"}),
        ("w8a8", set()),
        ("l6t", set()),
        ("w4g32a8-gptq", {"sweep.threads", "calibration.batch_size"}),
        ("w8a8-smooth", {"sweep.threads", "calibration.batch_size"}),
        ("a8ts", {"sweep.threads", "calibration.batch_size"}),
    ],
)
def test_a_key_holds_how_a_cell_was_computed_where_that_moves_its_scores(
    scheme: str, moved_by: set[str], toy_folder: Path
) -> None:
    job = _job(toy_folder, scheme)
    moved = set()
    for name, value in {
        "sweep.threads": 2,
        "evaluation.batch_size": 4,
        "calibration.batch_size": 3,
        "sweep.workers": 2,
    }.items():
        other = _job(toy_folder, scheme, **{name.replace(".", "__"): value})
        moved |= {name} if other.key != job.key else set()
        assert what_was_computed(other.made_by) == what_was_computed(job.made_by)
    assert moved == moved_by
    assert (COMPUTATION in job.made_by) == bool(moved_by)


def test_threads_move_a_profile_and_batch_sizes_do_not(toy_folder: Path) -> None:
    job = _job(toy_folder, "w16", "profile")
    assert _job(toy_folder, "w16", "profile", sweep__threads=2).key != job.key
    assert _job(toy_folder, "w16", "profile", evaluation__batch_size=2).key == job.key


def test_codes_are_of_threads_and_calibration_and_shared_among_schemes_of_one_grid(toy_folder: Path) -> None:
    made = [_job(toy_folder, scheme).weights_made_by for scheme in ("w4g32-gptq", "w4g32a8-gptq")]
    assert made[0] == made[1]
    for name, same in (
        ("sweep__threads", False),
        ("calibration__batch_size", False),
        ("evaluation__batch_size", True),
    ):
        assert (_job(toy_folder, "w4g32-gptq", **{name: 5}).weights_made_by == made[0]) == same


@pytest.mark.parametrize(
    "scheme",
    [
        "w4g32",
        "w4g32-gptq",
        "w4g32z-hqq",
        "w4g32-awq",
        "w4g32-clip",
        "w4a4-rotate",
        "w8a8-smooth",
        "l6t",
        "fp8",
    ],
)
def test_a_scheme_compares_with_its_baseline_whatever_made_its_codes(scheme: str, toy_folder: Path) -> None:
    """What a method was calibrated on is of the scheme; checkpoint, data and settings of the evaluation are not."""
    job, baseline = _job(toy_folder, scheme), _job(toy_folder, "w16")
    assert measured_on(job.made_by) == measured_on(baseline.made_by)
    for changed in ({"evaluation__perplexity__num_sequences": 3}, {"evaluation__bos": "always"}):
        assert measured_on(_job(toy_folder, scheme, **changed).made_by) != measured_on(baseline.made_by)


def test_a_mixed_scheme_compares_with_its_baseline(toy_folder: Path) -> None:
    changes = {"quantize__widths": "{'*.down_proj': w8}"}
    assert measured_on(_job(toy_folder, "w4-mixed", **changes).made_by) == measured_on(
        _job(toy_folder, "w16").made_by
    )
