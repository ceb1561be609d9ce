"""Every sentence of the findings stands where its figure does, and nowhere else."""

import pandas as pd
import pytest

from reports.findings import accuracy_finding
from reports.outlier_findings import _measured
from reports.score_tables import scheme_entry
from reports.scores import SIGNIFICANT

FIGURES = {
    "massive_activations / num_activations": (3.0, "3 massive activations in 2 layers (Sun et al. 2024)"),
    "llm_int8_outlier_features / num_features": (
        1.0,
        "1 outlier feature by LLM.int8() (Dettmers et al. 2022)",
    ),
    "attention_sink_rate / all_maps": (41.6, "attention sink rate 42% (Gu et al. 2025)"),
}
LAYERS = {"massive_activations / num_layers": 2.0}


def _frame(values: dict[str, float]) -> pd.DataFrame:
    return pd.DataFrame({"measure": list(values), "value": list(values.values())})


@pytest.mark.parametrize("name", FIGURES)
def test_a_measure_is_told_where_it_was_taken(name: str) -> None:
    value, sentence = FIGURES[name]
    assert _measured(_frame({name: value} | LAYERS)) == f"{sentence}."
    others = {other: number for other, (number, _) in FIGURES.items() if other != name}
    told = _measured(_frame(others | LAYERS))
    assert sentence not in told and all(FIGURES[other][1] in told for other in others)


def test_no_measure_is_no_sentence_and_a_zero_is_a_figure() -> None:
    assert _measured(_frame({})) == ""
    assert _measured(_frame(dict.fromkeys(FIGURES, 0.0) | LAYERS)) == (
        "0 massive activations (Sun et al. 2024); 0 outlier features by LLM.int8() (Dettmers et al. 2022); "
        "attention sink rate 0% (Gu et al. 2025)."
    )


@pytest.mark.parametrize(("p", "told"), [(SIGNIFICANT, 0), (SIGNIFICANT - 1e-9, 1), (SIGNIFICANT + 1e-9, 0)])
def test_accuracy_tells_a_scheme_from_its_baseline_below_the_level_and_not_at_it(p: float, told: int) -> None:
    row = {"checkpoint": "m", "scheme": "w4", "mcnemar_p": p, "holm_p": p, "n": 10.0, "ref": "R1"}
    finding = accuracy_finding(pd.DataFrame([row | {"smallest_detectable": 0.1}]))
    assert (
        finding is not None and f"10 documents tell {told} of 1 scheme from the baseline" in finding.points[0]
    )
    assert (": w4 (exact" in finding.points[0]) == bool(told)


def test_accuracy_that_was_not_tested_tells_nothing() -> None:
    columns = ["checkpoint", "scheme", "mcnemar_p", "holm_p", "n", "ref", "smallest_detectable"]
    assert accuracy_finding(pd.DataFrame(columns=columns, dtype=float)) is None


@pytest.mark.parametrize(
    ("scheme", "precision", "shown"),
    [
        ("w16", "dequantized Q4_1", "w16 (dequantized Q4_1)"),
        ("w16", "", "w16"),
        ("w4", "dequantized Q4_1", "w4"),
    ],
)
def test_the_baseline_says_what_it_is(scheme: str, precision: str, shown: str) -> None:
    row = {"scheme": scheme, "baseline_precision": precision, "no_evidence": "", "ref": "R1"}
    assert scheme_entry(row).text == shown
    assert scheme_entry(row | {"no_evidence": "of its own grid"}).text == f"{shown} †"
