"""Whether a scheme fits a model, told by shapes and names before anything is changed."""

from collections.abc import Sequence

from torch import nn

from quantlab.calibration.calibrator import Calibrator
from quantlab.errors import SchemeError
from quantlab.kernels.choice import check_integers, check_packed, choose_kernel
from quantlab.layers.fake_quant import FakeQuant
from quantlab.layers.linear import QuantLinear
from quantlab.layers.same_attention import check_same_attention
from quantlab.layers.targets import Choice, Target, check_skip, choose_targets
from quantlab.schemes import Scheme, TensorSpec, check_shapes, check_widths
from quantlab.solving.asked import Asked

__all__ = ["check_fits"]


def check_fits(model: nn.Module, asked: Asked, calibrator: Calibrator | None) -> Choice:
    """Everything that can be told before anything is changed; the linears that are chosen.

    Raises:
        SchemeError: the scheme does not fit the model, or needs calibration where there is none.
        ProbeError: it rounds what lies inside attention, and the model's attention has no sites.
    """
    scheme, config = asked.scheme, asked.config
    carries = any(isinstance(module, QuantLinear | FakeQuant) for module in model.modules())
    if carries and not scheme.is_baseline:
        raise SchemeError(
            "a model takes one scheme at a time: this one carries one already. Load it anew, or the checkpoint that "
            "its folder was made from."
        )
    if scheme.needs and calibrator is None:
        raise SchemeError(
            f"{scheme.name} needs calibration ({', '.join(sorted(scheme.needs))}): none was given. Give a calibrator."
        )
    if scheme.sites or scheme.head_sites:
        check_same_attention(model)
    if config.skip:
        check_skip(model, config.skip)
    if scheme.weights is None and scheme.activations is None:
        return Choice((), (), ())
    choice = choose_targets(model, config.skip)
    _check_linears(model, asked, choice.chosen)
    return choice


def _check_linears(model: nn.Module, asked: Asked, chosen: Sequence[Target]) -> None:
    """Refuse groups that do not divide, widths that match nothing, and integer sums that do not fit."""
    scheme, device = asked.scheme, next(model.parameters()).device
    check_widths(scheme, asked.config.widths, [target.name for target in chosen])
    for target in chosen:
        weights = asked.weights_of(target.name)
        shape = {target.name: (target.shape[0], target.shape[1])}
        check_shapes(Scheme(weights, scheme.activations), shape)
        runs, _ = choose_kernel(weights, scheme.activations, device.type, asked.config.kernel)
        if runs == "int8_mm":
            assert isinstance(weights, TensorSpec) and scheme.activations is not None
            check_integers(weights, scheme.activations, shape)
            if asked.config.kernel == "packed" and scheme.method == "hqq":
                raise SchemeError(
                    f"packed kernels need integer zero points where inputs are in low bits: those of {scheme.name} are "
                    "real numbers. Use kernel=integer."
                )
        elif runs in ("int4_packed", "int8_packed"):
            assert isinstance(weights, TensorSpec)
            check_packed(runs, weights, shape)
