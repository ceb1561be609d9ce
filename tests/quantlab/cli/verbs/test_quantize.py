"""`quantlab quantize`."""

from pathlib import Path

import pytest

from tests.quantlab.cli.command import calibrated, quantlab, result_of, with_a_dead_channel


def test_a_fallback_is_named_with_its_layer_on_the_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, out = with_a_dead_channel(tmp_path / "toy"), tmp_path / "out"
    command = ["quantize", checkpoint, "--scheme", "w4g32-gptq", "--out", out, *calibrated(tmp_path, 8, 32)]
    note = "gptq: 1 dead input channels take their nearest codes (layer 2: mlp.down_proj)"
    assert result_of(capsys, *command)["notes"] == [note]
    card = (out / "README.md").read_text(encoding="utf-8").replace("\\", "")
    assert f"| note | {note} |" in card


@pytest.mark.parametrize("method", ["gptq", "awq", "wclip"])
def test_too_few_tokens_are_said_on_the_card_and_below_the_table(
    method: str, toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["quantize", toy_folder, "--scheme", f"w4g32-{method}", "--out", out]
    code, printed, err = quantlab(capsys, *command, *calibrated(tmp_path, 1, 16))
    assert code == 0, err
    note = f"{method}: 16 tokens for 96 input channels: rank-deficient (layers 0-1: mlp.down_proj)"
    assert note in (out / "README.md").read_text(encoding="utf-8").replace("\\", "")
    assert printed.count(note) == 1
