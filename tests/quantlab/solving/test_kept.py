"""Schemes of a sweep are solved once, together; what is damaged is solved anew."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantlab.config import build_config
from quantlab.layers.linear import QuantLinear
from quantlab.methods.gptq import quantize_weights
from quantlab.quantize import quantized
from quantlab.records import source_hash
from quantlab.schemes import Scheme
from quantlab.solutions import SolutionStore
from quantlab.solving.linear import QUANTIZERS
from quantlab.sweep.jobs import Job
from tests.quantlab.whole_models import calibrator, model_of


class Counting:
    """GPTQ that counts how often, and for how many schemes, it was called."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, weight: Tensor, specs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        self.calls.append(len(specs))
        return quantize_weights(weight, specs, *args, **kwargs)


def test_schemes_of_a_sweep_are_solved_together_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting()
    monkeypatch.setitem(QUANTIZERS, "gptq", counting)
    names = ("w3-gptq", "w4g32-gptq", "w4a8-gptq", "w4g32z-gptq-bias", "w4-gptq-fold", "w4", "w4g32-awq")
    schemes = tuple(map(Scheme.parse, names))
    store = SolutionStore(tmp_path, {"checkpoint": "toy"}, schemes)
    model, kept, codes = model_of(), calibrator(), {}
    for scheme in schemes[:4]:
        with quantized(model, scheme, calibrator=kept, solutions=store) as changes:
            codes[scheme.name] = [m.weight.clone() for m in model.modules() if isinstance(m, QuantLinear)]
        alone = quantized(model, scheme, calibrator=kept)
        count = len(counting.calls)
        with alone as again:
            weights = [m.weight for m in model.modules() if isinstance(m, QuantLinear)]
            assert all(torch.equal(a, b) for a, b in zip(codes[scheme.name], weights, strict=True))
        del counting.calls[count:]
        assert changes.summary() == again.summary()
    # one call a linear, for the four grids; the folded model is another one
    assert counting.calls == [4] * 14


def test_what_is_damaged_or_of_something_else_is_solved_anew(tmp_path: Path) -> None:
    scheme, model, kept = Scheme.parse("w4g32-gptq"), model_of(), calibrator()
    store = SolutionStore(tmp_path, {"checkpoint": "toy"}, (scheme,))
    with quantized(model, scheme, calibrator=kept, solutions=store):
        pass
    known = store.load(scheme)
    assert known is not None and len(known) == 14
    other = SolutionStore(tmp_path, {"checkpoint": "another"}, (scheme,))
    assert other.path(scheme) != store.path(scheme) and other.load(scheme) is None
    file = sorted(store.path(scheme).glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:200])
    assert store.load(scheme) is None
    with quantized(model, scheme, calibrator=kept, solutions=store):
        pass
    again = store.load(scheme)
    assert again is not None
    assert all(torch.equal(again[n].quantized.codes, known[n].quantized.codes) for n in known)
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name], "nothing half-done is left"


def test_a_flipped_byte_of_a_solution_is_seen(tmp_path: Path) -> None:
    scheme, model, kept = Scheme.parse("w4g32-gptq"), model_of(), calibrator()
    store = SolutionStore(tmp_path, {"checkpoint": "toy"}, (scheme,))
    with quantized(model, scheme, calibrator=kept, solutions=store):
        pass
    file = sorted(store.path(scheme).glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-7] ^= 16
    file.write_bytes(content)
    assert store.load(scheme) is None
    file.unlink()
    assert store.load(scheme) is None


def test_a_solution_is_of_the_code_that_found_it(tmp_path: Path) -> None:
    """`source_hash` covers every source, see tests of quantlab.records."""
    scheme = Scheme.parse("w4g32-gptq")
    paths = set()
    for code in (source_hash(), "other"):
        config = build_config({"checkpoints": [{"path": "toy"}]})
        job = Job(None, config, {"checkpoint": "toy", "code": code, "seconds": 1})  # type: ignore[arg-type]
        assert job.weights_made_by == {"checkpoint": "toy", "code": code, "computation": {"threads": 1}}
        paths.add(SolutionStore(tmp_path, job.weights_made_by).path(scheme))
    assert len(paths) == 2
