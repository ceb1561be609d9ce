"""Linears that read one tensor share their sums, and no others do."""

from typing import Any

import pytest
import torch
from torch import nn

from probes.hooks import watch
from quantlab.calibration.stream import BlockStep
from quantlab.calibration.watcher import Watcher
from quantlab.errors import CalibrationError


class _Twins(nn.Module):
    """Two linears; `calls` says for each of them which of the given tensors it reads, in order."""

    def __init__(self, *calls: tuple[str, int]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 2), nn.Linear(8, 2)
        self.calls = calls

    def forward(self, *xs: torch.Tensor) -> None:
        for name, which in self.calls:
            self.get_submodule(name)(xs[which])


def _seen(twins: _Twins, *xs: torch.Tensor) -> dict[str, Any]:
    step = BlockStep("layer", twins, torch.empty(0), lambda n: None)  # type: ignore[arg-type,return-value]
    watcher = Watcher(step, ["layer.a", "layer.b"], [], torch.float32)
    with torch.no_grad(), watch(twins, watcher.places, watcher.see):
        twins(*xs)
    return dict(watcher.result("layer").linears)


def _x(seed: int = 0) -> torch.Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("calls", [[("a", 0), ("b", 0)], [("b", 0), ("a", 0), ("b", 1), ("a", 1)]])
def test_one_tensor_is_summed_once(calls: list[tuple[str, int]]) -> None:
    x, y = _x(), _x(1)
    found = _seen(_Twins(*calls), x, y)
    expected = x.T @ x + (y.T @ y if len(calls) > 2 else 0)
    assert found["layer.a"].gram_II is found["layer.b"].gram_II
    torch.testing.assert_close(found["layer.a"].gram_II, expected)


def test_views_and_copies_of_a_tensor_are_tensors_of_their_own() -> None:
    x = _x()
    found = _seen(_Twins(("a", 0), ("b", 1)), x, x.view(5, 8))
    assert found["layer.a"].gram_II is not found["layer.b"].gram_II
    assert torch.equal(found["layer.a"].gram_II, found["layer.b"].gram_II)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("part", [slice(None), slice(2, 3)])
def test_a_tensor_changed_in_place_is_another(inference: bool, part: slice) -> None:
    """Whether itself or through a view."""
    with torch.inference_mode(inference):
        x = _x().clone()
        before, twins = x.clone(), _Twins(("a", 0), ("b", 0))

        def double(_: nn.Module, args: tuple[torch.Tensor]) -> None:
            args[0][part].mul_(2)

        twins.b.register_forward_pre_hook(double)
        found = _seen(twins, x)
    torch.testing.assert_close(found["layer.a"].gram_II, before.T @ before)
    torch.testing.assert_close(found["layer.b"].gram_II, x.T @ x)
    assert not torch.equal(found["layer.a"].gram_II, found["layer.b"].gram_II)


def test_a_tensor_in_the_place_of_one_that_is_gone_is_another() -> None:
    """Identities are reused as soon as a tensor is freed."""
    watcher = Watcher(
        BlockStep("layer", _Twins(), torch.empty(0), lambda n: None),  # type: ignore[arg-type,return-value]
        ["layer.a", "layer.b"], [], torch.float32,
    )  # fmt: skip
    ids = []
    for name, value in (("a", 1.0), ("b", 2.0)):
        x = torch.full((1, 8), value)
        ids.append(id(x))
        watcher.see(name, nn.Identity(), (x,), None)
        del x
    found = watcher.result("layer").linears
    assert ids[0] == ids[1]
    assert (found["layer.a"].gram_II == 1).all() and (found["layer.b"].gram_II == 4).all()


@pytest.mark.parametrize(
    "calls",
    [
        [("a", 0), ("b", 0), ("a", 1), ("b", 2)],  # b goes its own way
        [("a", 0), ("b", 0), ("a", 1)],  # b is left out
        [("a", 0), ("a", 0), ("b", 0)],  # a reads it twice
    ],
)
def test_linears_that_share_in_some_calls_only_are_refused(calls: list[tuple[str, int]]) -> None:
    with pytest.raises(
        CalibrationError, match=r"must do so in every call.*layer\.b and layer\.a read one in some calls only"
    ):
        _seen(_Twins(*calls), _x(), _x(1), _x(2))


def test_linears_that_meet_later_keep_sums_of_their_own() -> None:
    x, y, z = _x(), _x(1), _x(2)
    found = _seen(_Twins(("a", 0), ("b", 1), ("a", 2), ("b", 2)), x, y, z)
    torch.testing.assert_close(found["layer.a"].gram_II, x.T @ x + z.T @ z)
    torch.testing.assert_close(found["layer.b"].gram_II, y.T @ y + z.T @ z)
