"""A run's folder: order, references, holes, damage and names that collide."""

from pathlib import Path

import pytest

from quantlab.errors import RecordError
from quantlab.records import write_record, write_sealed
from reports.cautions import cautions
from reports.load import load_run, scheme_order, spans
from reports.outliers import outliers
from reports.scores import scores
from tests.reports.synthetic import evaluation_cell, write_run


def test_cells_come_by_checkpoint_profile_first_and_from_many_bits_to_few(tmp_path: Path) -> None:
    write_run(
        tmp_path / "run", checkpoints=("A", "B"), schemes=("l4t", "w4", "w8", "w16"), tasks=("perplexity",)
    )
    cells = load_run(tmp_path / "run").cells
    assert [(c.checkpoint, c.record.kind, c.scheme) for c in cells[:5]] == [
        ("A", "profile", "w16"), ("A", "evaluation", "w16"), ("A", "evaluation", "w8"), ("A", "evaluation", "w4"),
        ("A", "evaluation", "l4t"),
    ]  # fmt: skip
    assert [cell.ref for cell in cells] == [f"R{i}" for i in range(1, 11)]


def test_a_planned_cell_without_a_record_is_a_named_hole(tmp_path: Path) -> None:
    write_run(tmp_path, checkpoints=("A", "B"), schemes=("w16", "w8", "w4"), absent=[("B", "w8")])
    run = load_run(tmp_path)
    assert [(h.kind, h.checkpoint, h.scheme) for h in run.holes] == [("evaluation", "B", "w8")]
    row = scores(run).query("checkpoint == 'B' and scheme == 'w8'").iloc[0]
    assert row["status"] == "missing" and row[["n", "margin_change", "perplexity"]].isna().all()


def test_a_checkpoint_without_any_record_is_named_by_its_path(tmp_path: Path) -> None:
    absent = [("B", "w16"), ("B", "w8")]
    write_run(tmp_path, checkpoints=("A", "B"), schemes=("w16", "w8"), absent=absent, profile=False)
    assert {h.checkpoint for h in load_run(tmp_path).holes} == {"models/B"}


@pytest.mark.parametrize("ending", ["json", "parquet"])
def test_a_damaged_record_is_left_out_by_name(tmp_path: Path, ending: str) -> None:
    records = write_run(tmp_path, schemes=("w16", "w8", "w4"))
    damaged = tmp_path / "records" / f"{records[2].key}.{ending}"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    run = load_run(tmp_path)
    assert [problem.file for problem in run.problems] == [f"records/{records[2].key}.json"]
    assert "as it was written" in run.problems[0].what and str(tmp_path) not in run.problems[0].what
    assert records[2].key not in {cell.record.key for cell in run.cells} and len(run.cells) == 3
    assert [hole.scheme for hole in run.holes] == ["w8"]


def test_a_damaged_plan_leaves_all_records(tmp_path: Path) -> None:
    write_run(tmp_path, schemes=("w16", "w8"))
    (tmp_path / "run.json").write_text("{")
    run = load_run(tmp_path)
    assert len(run.cells) == 3 and run.holes == () and run.problems[0].file == "run.json"


def test_records_of_other_settings_are_counted_but_not_used(tmp_path: Path) -> None:
    write_run(tmp_path, schemes=("w16", "w8"))
    write_record(tmp_path, *evaluation_cell("A", 0, "w4", ("hellaswag",), 8), {})
    run = load_run(tmp_path)
    assert run.num_unplanned == 1 and len(run.cells) == 3


def test_no_record_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"at least one whole record: .* has none"):
        load_run(tmp_path / "nowhere")


def test_checkpoints_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        write_record(tmp_path, *evaluation_cell("A", 0, "w16", ("perplexity",), 8, dtype=dtype), {})
    assert set(load_run(tmp_path).checkpoints) == {"A, float32", "A, bfloat16"}
    write_record(tmp_path, *evaluation_cell("A", 0, "w16", ("perplexity",), 8, content_hash="f" * 64), {})
    assert "A, float32, ffffffff" in load_run(tmp_path).checkpoints


def test_what_the_plan_cannot_place_is_no_checkpoint(tmp_path: Path) -> None:
    records = write_run(tmp_path, schemes=("w16", "w8"), profile=False)
    config = {"checkpoints": [{"path": "A"}], "schemes": ["w8", "w16"], "evaluation": {"tasks": []}}
    keys = [records[0].key, "0" * 64, "1" * 64]
    write_sealed(tmp_path / "run.json", {"config": config, "config_fingerprint": "0" * 64, "records": keys})
    run = load_run(tmp_path)
    assert [hole.kind for hole in run.holes] == ["unknown"] * 2 and len(run.checkpoints) == 1
    assert any("2 cells whose place" in line for line in cautions(run, scores(run), outliers(run)))


def test_scheme_order_and_spans() -> None:
    names = ["l4t", "w8a8", "w4", "w16", "w8", "l8t"]
    assert sorted(names, key=scheme_order) == ["w16", "w8", "w4", "w8a8", "l8t", "l4t"]
    assert spans(["R1", "R3", "R4", "R5", "R8"]) == "R1, R3–R5, R8"
