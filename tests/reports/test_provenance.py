"""What was quantized, as a table: also from records that know nothing of notes and layers."""

import json
from pathlib import Path

from reports.load import load_run
from reports.provenance import quantized_table, records_table
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


CPU = {"name": "AMD EPYC", "instruction_sets": ["fma", "avx2"], "torch": "AVX2", "onednn": True}


def test_a_run_over_unlike_machines_says_so(tmp_path: Path) -> None:
    """And one on like machines does not, however its times and hosts differ."""
    folder = tmp_path / "run"
    write_run(folder, schemes=("w4",), profile=True)
    sidecars = sorted((folder / "sidecars").glob("*.json"))
    for number, path in enumerate(sidecars):
        path.write_text(json.dumps({"host": f"host {number}", "wall_s": number, "cpu": CPU}))
    assert "machines" not in records_table(load_run(folder)).note

    other = CPU | {"onednn": False, "settings": {"ATEN_CPU_CAPABILITY": "avx2"}}
    sidecars[0].write_text(json.dumps({"cpu": other, "gpu": "NVIDIA H100"}))
    run = load_run(folder)
    (moved,) = [cell.ref for cell in run.cells if cell.record.key == sidecars[0].stem]
    note = records_table(run).note
    assert "Computed on unlike machines: " in note
    assert (
        f"{moved} on NVIDIA H100, AMD EPYC (fma, avx2; torch AVX2; ATEN_CPU_CAPABILITY=avx2, without oneDNN)"
        in note
    )
    assert " on AMD EPYC (fma, avx2; torch AVX2)" in note


def test_records_without_a_whole_sidecar_name_no_machine(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(folder, schemes=("w4",), profile=True)
    first, *others = sorted((folder / "sidecars").glob("*.json"))
    for path in others:
        path.unlink()
    first.write_text("[")
    assert {cell.machine for cell in load_run(folder).cells} == {""}
    assert "machines" not in records_table(load_run(folder)).note
    first.write_text(json.dumps({"cpu": CPU}))
    assert "on a machine unnamed" in records_table(load_run(folder)).note
