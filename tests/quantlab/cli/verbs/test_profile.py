"""`quantlab profile`."""

from pathlib import Path

import pytest

from tests.quantlab.cli.command import FAST, result_of


def test_profile_prints_the_magnitudes_and_the_record(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = result_of(capsys, "profile", toy_folder, *FAST, "--out", tmp_path / "run")
    for tensor in ("attention_logits", "hidden_states"):
        values = [result[tensor][name] for name in ("top1", "top2", "top3", "top10", "top100", "median")]
        assert values == sorted(values, reverse=True) and values[-1] > 0
    # 2 sequences, 2 layers, 4 heads, every causal pair of 32 tokens; 2 layers of 64 channels
    assert result["attention_logits"]["n"] == 2 * 2 * 4 * 32 * 33 // 2
    assert result["hidden_states"]["n"] == 2 * 2 * 32 * 64
    assert Path(result["record"]).exists()
