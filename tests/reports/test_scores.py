"""Scores are the records'; changes are those that quantlab.statistics finds in the per-item results."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from quantlab import statistics
from quantlab.records import Record, read_items, write_record
from reports.changes import baseline_of
from reports.findings import accuracy_finding, cost_findings, summary
from reports.load import load_run
from reports.provenance import records_table
from reports.scores import scores
from tests.reports.synthetic import evaluation_cell, made_by, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    folder = tmp_path_factory.mktemp("run")
    origin = {"source_precision": "dequantized Q4_1", "source_scheme": "w4g32z"}
    write_run(folder, schemes=("w16", "w8", "w4", "w4g32z", "w4a4"), profile=False, **origin)
    return folder, scores(load_run(folder)).set_index("scheme")


def test_scores_are_those_of_the_records(run: tuple[Path, pd.DataFrame]) -> None:
    for cell in load_run(run[0]).cells:
        row, result = run[1].loc[cell.scheme], cell.record.result
        assert row["key"] == cell.record.key and row["n"] == result["hellaswag"]["n"]
        assert row["acc_norm"] == result["hellaswag"]["acc_norm"]
        assert [row["acc_norm_low"], row["acc_norm_high"]] == result["hellaswag"]["acc_norm_interval"]
        assert row["perplexity"] == result["perplexity"]["perplexity"]
        assert row["weights_bytes"] == result["quantization"]["weights_bytes"]


def test_changes_are_paired_over_the_same_items(run: tuple[Path, pd.DataFrame]) -> None:
    folder, frame = run
    ours, base = (
        {task: read_items(folder, frame.loc[scheme, "key"], task) for task in ("hellaswag", "perplexity")}
        for scheme in ("w4", "w16")
    )
    row = frame.loc["w4"]
    margin = statistics.paired_difference(ours["hellaswag"]["margin"], base["hellaswag"]["margin"])
    assert (row["margin_change"], row["margin_change_low"], row["margin_change_high"]) == (
        margin.value, margin.low, margin.high,
    )  # fmt: skip
    text = ours["perplexity"]
    nats = statistics.paired_text_difference(
        text["nats"], base["perplexity"]["nats"], text["num_tokens"], text["document"]
    )
    assert (row["nats_change"], row["nats_change_low"]) == (nats.value, nats.low)
    right, was = (each["hellaswag"]["correct_norm"].astype(float) for each in (ours, base))
    assert row["mcnemar_p"] == statistics.mcnemar_exact(right, was)
    assert row["lost"] - row["won"] == was.sum() - right.sum()
    # Four schemes are tested: Holm's first step asks for 5% / 4.
    flipped = int((right != was).sum())
    assert row["smallest_detectable"] == statistics.minimum_detectable_effect(len(right), flipped, 0.05 / 4)


def test_p_values_are_adjusted_for_the_schemes_of_a_checkpoint(run: tuple[Path, pd.DataFrame]) -> None:
    tested = run[1].drop(index="w16")
    assert np.array_equal(tested["holm_p"], statistics.holm(tested["mcnemar_p"]))
    assert pd.isna(run[1].loc["w16", "holm_p"])


def test_a_scheme_on_the_sources_own_grid_is_no_evidence(run: tuple[Path, pd.DataFrame]) -> None:
    marked = run[1]["no_evidence"]
    assert marked["w4g32z"].startswith("no evidence") and (marked.drop("w4g32z") == "").all()
    found = cost_findings(run[1].reset_index())[0]
    assert "w4g32z" not in " ".join(found.points)


def test_nothing_is_compared_across_different_items(tmp_path: Path) -> None:
    """Two records that claim the same data but hold different documents are not compared, and it is said."""
    write_record(tmp_path, *evaluation_cell("A", 0, "w16", ("hellaswag",), 16), {})
    write_record(tmp_path, *evaluation_cell("A", 0, "w8", ("hellaswag",), 12), {})
    row = scores(load_run(tmp_path)).set_index("scheme").loc["w8"]
    assert "items differ" in row["note"] and pd.isna(row["margin_change"])


def test_settings_that_do_not_compare_are_groups_of_their_own(tmp_path: Path) -> None:
    for scheme in ("w16", "w8"):
        write_record(tmp_path, *evaluation_cell("A", 0, scheme, ("perplexity",), 8), {})
    record, items = evaluation_cell("A", 0, "w8", ("perplexity",), 8)
    other = made_by("A", "w8") | {"data": {"perplexity": "ee" * 32}}
    write_record(tmp_path, Record.of("evaluation", other, {}, record.result), items, {})
    frame = scores(load_run(tmp_path))
    assert set(frame["checkpoint"]) == {"A, setting 1", "A, setting 2"} and len(frame) == 3
    assert (frame["note"] != "").sum() == 1 and frame["nats_change"].notna().sum() == 1


def test_records_that_were_computed_otherwise_compare_and_it_is_said(tmp_path: Path) -> None:
    """Threads and batch size are in a record's key; they do not decide what it is compared with."""
    hows = {
        "w16": {"threads": 1, "batch_size": "auto"},
        "w8": {"threads": 2, "batch_size": "auto"},
        "w8a8": None,
    }
    for scheme, how in hows.items():
        record, items = evaluation_cell("A", 0, scheme, ("perplexity",), 8)
        made = record.made_by | ({"computation": how} if how else {})
        write_record(tmp_path, Record.of("evaluation", made, {}, record.result), items, {})
    run = load_run(tmp_path)
    frame = scores(run)
    assert set(frame["checkpoint"]) == {"A"} and frame["nats_change"].notna().sum() == 2
    refs = {cell.scheme: cell.ref for cell in run.cells}
    note = records_table(run).note
    assert f"threads 1 ({refs['w16']}), threads 2 ({refs['w8']})" in note
    assert "batch size" not in note and refs["w8a8"] not in note.partition("unlike ways")[2]


def test_a_baseline_that_was_computed_alike_is_preferred(tmp_path: Path) -> None:
    cells = []
    for scheme, threads in (("w16", 1), ("w16", 2), ("w8", 2), ("w16", 3)):
        record, items = evaluation_cell("A", 0, scheme, ("perplexity",), 8)
        made = record.made_by | {"computation": {"threads": threads}}
        cells.append(Record.of("evaluation", made, {}, record.result))
        write_record(tmp_path, cells[-1], items, {})
    run = load_run(tmp_path)
    (ours,) = [cell for cell in run.cells if cell.scheme == "w8"]
    found = baseline_of(ours, run.cells)
    assert found is not None and found.record.key == cells[1].key


def test_series_split_where_two_schemes_share_bits(run: tuple[Path, pd.DataFrame]) -> None:
    assert run[1].loc["w4", "series"] == "weights, per channel"
    assert run[1].loc["w4g32z", "series"] == "weights, groups of 32, zero point †"
    assert run[1].loc["w4a4", "series"] == "weights + activations"


def test_a_series_has_one_scheme_at_each_number_of_bits(tmp_path: Path) -> None:
    schemes = ("w16", "w8", "w4", "w4g64", "w4g32z", "w8a8", "w4a8", "w4a4", "l4t")
    write_run(tmp_path, checkpoints=("A", "B"), schemes=schemes, profile=False, num_documents=8)
    frame = scores(load_run(tmp_path))
    assert len(frame) == 18 and not frame.duplicated(["checkpoint", "series", "bits"]).any()


def _frame(**changes: list[float]) -> pd.DataFrame:
    """Three compared schemes of one checkpoint with the given columns."""
    rows = pd.DataFrame(
        {
            "checkpoint": "A", "scheme": ["w8", "w6", "w4"], "ref": ["R2", "R3", "R4"], "baseline_ref": "R1",
            "series": "weights", "bits": [8.0, 6.0, 4.0], "no_evidence": "",
        }
    )  # fmt: skip
    names = [
        f"{name}{end}"
        for name in ("margin_change", "nats_change", "acc_norm")
        for end in ("", "_low", "_high")
    ]
    blank = {name: [np.nan] * 3 for name in [*names, "mcnemar_p", "holm_p", "smallest_detectable", "n"]}
    return rows.assign(**(blank | changes))


def test_findings_follow_the_intervals() -> None:
    frame = _frame(
        nats_change=[0.0005, 0.02, 0.9], nats_change_low=[-0.001, 0.01, 0.8], nats_change_high=[0.001, 0.03, 1.0],
        margin_change=[0.1, -0.2, -3.0], margin_change_low=[-0.3, -0.5, -4.0], margin_change_high=[0.5, 0.1, -2.0],
    )  # fmt: skip
    (finding,) = cost_findings(frame)
    assert finding.points == (
        "No measurable loss: w8. Losses up to 0.001 nats per token or 0.3 nats of margin per document lie within "
        "their intervals.",
        "Measurable losses, in perplexity of the text, smallest first: w6 +2%, w4 ×2.46.",
        "Losses are read from 6 paired 95% intervals, each of one comparison and not adjusted for their number: one in "
        "twenty misses its true value.",
        "Fewest bits that keep perplexity within 1%, the whole interval counted. Weights: 8 (w8).",
    )
    assert finding.refs == ("R1", "R2", "R3", "R4")


def test_without_an_interval_a_loss_cannot_be_told(tmp_path: Path) -> None:
    write_run(tmp_path, schemes=("w16", "w4"), tasks=("hellaswag",), profile=False, num_documents=1)
    run = load_run(tmp_path)
    frame = scores(run)
    points = " ".join(cost_findings(frame)[0].points)
    assert "a loss cannot be told: w4." in points and "No measurable loss" not in points
    assert "Every scheme loses" not in points
    accuracy = accuracy_finding(frame)
    assert accuracy is not None and "inf" not in " ".join(accuracy.points)
    assert "1 document tells 0 of 1 scheme " in accuracy.points[0] and "on 1 HellaSwag document." in summary(
        run
    )


def test_the_summary_names_only_what_was_scored(tmp_path: Path) -> None:
    write_record(tmp_path, *evaluation_cell("A", 0, "w8", ("perplexity",), 8), {})
    assert "1 low-bit scheme, scored on 6,132 tokens of text, in 12 blocks of 511 tokens." in summary(
        load_run(tmp_path)
    )
    assert "baseline" not in summary(load_run(tmp_path))


def test_a_loss_in_the_margin_alone_counts() -> None:
    frame = _frame(
        margin_change=[0.1, -0.2, -3.0],
        margin_change_low=[-0.3, -0.5, -4.0],
        margin_change_high=[0.5, -0.1, -2.0],
    )
    points = cost_findings(frame)[0].points
    assert points[0].startswith("No measurable loss: w8.")
    assert points[1].endswith("smallest first: w6 −0.20 ± 0.20, w4 −3.00 ± 1.00.")


def test_accuracy_says_what_it_cannot_resolve() -> None:
    frame = _frame(
        mcnemar_p=[1.0, 0.04, 0.001], holm_p=[1.0, 0.08, 0.003], smallest_detectable=[np.inf, 0.04, 0.09]
    )
    finding = accuracy_finding(frame.assign(n=64.0))
    assert finding is not None
    assert finding.points[0].startswith(
        "A: 64 documents tell 1 of 3 schemes from the baseline: w4 (exact McNemar"
    )
    assert "must reach 4.0 to 9.0 points, by how many documents flip" in finding.points[1]
    assert finding.points[2].startswith("Under 1 of 3 schemes so few") and "at this n" in finding.points[2]
    assert "inf" not in " ".join(finding.points)
    assert accuracy_finding(_frame()) is None
