"""What was quantized, as a table: also from records that know nothing of notes and layers."""

from pathlib import Path

from reports.load import load_run
from reports.provenance import quantized_table
from tests.reports.synthetic import write_run


def test_a_fallback_stands_with_its_layers_and_older_records_are_read(tmp_path: Path) -> None:
    write_run(tmp_path / "run", schemes=("w4",), profile=False)
    run = load_run(tmp_path / "run")
    (cell,) = run.of_kind("evaluation")
    table = cell.record.result["quantization"]["table"]
    older = [[entry.text for entry in row] for row in quantized_table(run).rows if isinstance(row, tuple)]
    table.append(table[0] | {"count": 6, "note": "gptq: damping raised to 0.1", "layers": "0, 3-7"})
    *others, noted = [
        [entry.text for entry in row] for row in quantized_table(run).rows if isinstance(row, tuple)
    ]
    assert others == older and older[0][2] == table[0]["name"]
    assert noted[2:6] == [
        f"{table[0]['name']}, layers 0, 3-7",
        "6",
        "swapped",
        "w4: gptq: damping raised to 0.1",
    ]
