"""One linear: what goes wrong is said with its name."""

import pytest

from quantlab.errors import SchemeError
from quantlab.quantize import quantize_
from quantlab.schemes import Scheme
from tests.quantlab.whole_models import model_of


def test_the_name_of_the_linear_goes_with_a_method_s_complaint() -> None:
    model = model_of()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(SchemeError) as caught:
        quantize_(model, Scheme.parse("w4z-hqq"))
    assert "model.layers.1.mlp.down_proj" in " ".join([str(caught.value), *caught.value.__notes__])
