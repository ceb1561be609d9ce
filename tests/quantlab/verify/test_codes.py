"""Codes against digests: zero points at both ends of the grid, values beyond it, every format's linears."""

from pathlib import Path

import numpy as np
import pytest
import torch

from quantlab.manifest import read_manifest
from quantlab.reading.decoded import Decoded
from quantlab.verify.codes import CodesReport, check_codes
from quantlab.verify.sources import source_of
from tests.quantlab.verify.folders import exported
from tests.toys import toy_model, toy_tokenizer


class Given:
    """A folder of these linears."""

    def __init__(self, decoded: dict[str, Decoded]) -> None:
        self.decoded = decoded

    def linears(self) -> list[str]:
        return list(self.decoded)

    def decode(self, name: str) -> Decoded:
        return self.decoded[name]

    def stored_as(self, name: str) -> str:
        return "" if name == "up" else f"Q{self.decoded[name].bits}"

    def num_bytes(self) -> int:
        return 0

    def rounded_inputs(self) -> dict[str, int]:
        return {}


def report_of(decoded: Decoded, *, whole_zeros: bool = True) -> CodesReport:
    return check_codes(
        Given({"up": decoded}), {"up": decoded.digests()}, lambda count: None, whole_zeros=whole_zeros
    )


def matrix(zero: float = 7.0, code: int = 3, scale: float = 0.5) -> Decoded:
    codes = np.full((2, 4), code, np.uint8)
    return Decoded(codes, 4, np.full((2, 1), scale, np.float32), np.array([[7.0], [zero]], np.float32))


@pytest.mark.parametrize(
    ("decoded", "message"),
    [
        (matrix(zero=16.0), "codes and zero points must lie on the grid: up"),
        (matrix(zero=-1.0), "codes and zero points must lie on the grid: up"),
        (matrix(zero=6.5), "codes and zero points must lie on the grid: up"),
        (matrix(code=16), "codes and zero points must lie on the grid: up"),
        (matrix(zero=float("nan")), "scales must be finite: up"),
        (matrix(scale=float("inf")), "scales must be finite: up"),
    ],
)
def test_values_that_no_quantizer_chooses_are_named(decoded: Decoded, message: str) -> None:
    assert any(message in failure for failure in report_of(decoded).failures())


def test_zero_points_at_both_ends_are_counted_and_real_ones_let_through() -> None:
    ends = report_of(matrix(zero=15.0))
    assert (ends.num_zeros, ends.zeros_at_0, ends.zeros_at_max, ends.failures()) == (2, 0, 1, [])
    assert report_of(matrix(zero=0.0)).zeros_at_0 == 1
    assert not report_of(matrix(zero=16.5), whole_zeros=False).failures()


@pytest.fixture(scope="module")
def one_sided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy whose matrices have a row above zero and one below, so that zero points lie at both ends."""
    folder = tmp_path_factory.mktemp("one-sided") / "toy"
    model = toy_model("llama")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("proj.weight"):
                weight[0].abs_()
                weight[1].abs_().neg_()
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("format_name", ["gptq", "awq", "quantlab"])
def test_zero_points_at_the_ends_are_read_as_they_were_chosen(
    format_name: str, one_sided: Path, tmp_path: Path
) -> None:
    """A writer or reader that is off by one, as v1 of gptq is, would wrap around there."""
    folder = exported(one_sided, tmp_path / "out", "w4g32z", format_name)
    chosen = read_manifest(folder)["tensors"]
    report = check_codes(source_of(folder), chosen, lambda count: None)
    assert not report.failures() and report.num_linears == 14
    # Two or three groups in each of these rows.
    assert report.zeros_at_0 >= 28 and report.zeros_at_max >= 28


def test_types_that_linears_took_are_listed() -> None:
    """A format with several types says which linear has which."""
    given = {"wide": 4, "narrow": 8, "also": 8}
    tensors = {
        name: Decoded(np.zeros((1, 32), np.uint8), bits, np.ones((1, 1), np.float32))
        for name, bits in given.items()
    }
    report = check_codes(
        Given(tensors), {name: each.digests() for name, each in tensors.items()}, lambda count: None
    )
    assert report.stored_as == {"Q4": ["wide"], "Q8": ["narrow", "also"]}
    assert not report.failures()
