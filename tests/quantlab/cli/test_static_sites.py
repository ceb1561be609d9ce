"""Static ranges inside attention that has no sites."""

from pathlib import Path

import pytest

from tests.quantlab.cli.command import FAST, quantlab
from tests.toys import save_checkpoint


@pytest.mark.parametrize("family", ["mpt", "gptj"])
def test_attention_without_sites_is_said_even_where_a_calibration_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    folder = save_checkpoint(family, tmp_path / "toy")
    capsys.readouterr()
    options = ["--tasks", "perplexity", *FAST, "--out", tmp_path / "run"]
    for key, value in {
        "text.num_sequences": 2,
        "text.sequence_length": 32,
        "cache": tmp_path / "kept",
    }.items():
        options += ["--set", f"calibration.{key}={value}"]
    code, _, err = quantlab(capsys, "evaluate", folder, "--scheme", "w8a8ts", *options)
    assert code == 0, err
    code, _, err = quantlab(capsys, "evaluate", folder, "--scheme", "kv8hs", *options)
    assert code != 0 and f"to have sites: {family} computes" in err and "Calibrate first" not in err
