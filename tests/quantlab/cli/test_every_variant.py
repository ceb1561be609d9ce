"""A checkpoint of every attention variant is opened by the verbs."""

from pathlib import Path
from typing import Any

import pytest

from quantlab.attention.variants import VARIANTS
from tests.quantlab.cli.command import FAST, result_of
from tests.toys import save_checkpoint

EVERY: list[dict[str, Any]] = [
    *({"variant": name} for name in VARIANTS),
    {"variant": "continuous_depth", "variant_options": {"solver": "dopri5"}},
]


@pytest.mark.parametrize("toy", EVERY, ids=lambda toy: "-".join(map(str, toy.values())))
def test_every_variant_is_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], toy: dict[str, Any]
) -> None:
    folder = save_checkpoint("quantlab", tmp_path / "toy", **toy)
    capsys.readouterr()  # of the bar of what was saved
    options = ("--scheme", "w8", "--tasks", "perplexity", *FAST)
    result = result_of(capsys, "evaluate", folder, *options, "--out", tmp_path / "run")
    assert result["scheme"] == "w8" and result["perplexity"]["num_tokens"] == 2 * 31


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_one_block_for_all_layers_is_quantized_written_and_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], solver: str
) -> None:
    folder = save_checkpoint(
        "quantlab", tmp_path / "toy", variant="continuous_depth", variant_options={"solver": solver}
    )
    capsys.readouterr()
    written = tmp_path / "written"
    options = ("--tasks", "perplexity", *FAST, "--out", tmp_path / "run")
    result_of(capsys, "quantize", folder, "--scheme", "w4", "--format", "quantlab", "--out", written)
    simulated = result_of(capsys, "evaluate", folder, "--scheme", "w4", *options)
    read = result_of(capsys, "evaluate", written, "--scheme", "w16", *options)
    # The same codes and scales, multiplied in another order.
    assert read["perplexity"]["perplexity"] == pytest.approx(simulated["perplexity"]["perplexity"], rel=1e-4)
