"""`quantlab quantize`."""

from pathlib import Path

import pytest

from tests.quantlab.cli.command import calibrated, result_of, with_a_dead_channel


def test_a_fallback_is_named_with_its_layer_on_the_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, out = with_a_dead_channel(tmp_path / "toy"), tmp_path / "out"
    command = ["quantize", checkpoint, "--scheme", "w4g32-gptq", "--out", out, *calibrated(tmp_path, 8, 32)]
    note = "gptq: 1 dead input channels take their nearest codes (layer 2: mlp.down_proj)"
    assert result_of(capsys, *command)["notes"] == [note]
    card = (out / "README.md").read_text(encoding="utf-8").replace("\\", "")
    assert f"| note | {note} |" in card
