"""What is declared of each architecture."""

from quantlab.inspection.architectures import OURS, known_architectures
from quantlab.inspection.families import FAMILIES, Family, family_of
from quantlab.inspection.gguf_names import GGUF_ARCHITECTURES
from tests import toys


def test_an_unlisted_architecture_is_scored_unpacked() -> None:
    assert family_of("no_such_model") == Family(packable=False, masks="single")


def test_every_family_is_known_to_transformers_and_has_a_toy() -> None:
    assert FAMILIES.keys() <= {*known_architectures(), OURS}
    assert FAMILIES.keys() <= toys.FAMILIES.keys()


def test_families_that_take_a_mask_by_layer_type_are_declared() -> None:
    """A dictionary of masks is taken exactly by the models whose config names a type for every layer."""
    for name, family in FAMILIES.items():
        typed = getattr(toys.toy_config(name), "layer_types", None) is not None
        assert (family.masks == "by_layer_type") == typed, name


def test_families_shaped_like_llama_are() -> None:
    for name, family in FAMILIES.items():
        if name == OURS:
            continue  # named like Llama, shaped by its variant
        names = {module.rpartition(".")[2] for module, _ in toys.toy_model(name).named_modules()}
        projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert family.llama_shapes == (projections <= names), name


def test_the_class_of_linears_is_that_of_the_models() -> None:
    for name, family in FAMILIES.items():
        kinds = {type(module).__name__ for module in toys.toy_model(name).modules()}
        assert family.linear_class in kinds, name
        assert not kinds & ({"Conv1D", "FalconLinear"} - {family.linear_class}), name


def test_base_prefixes_are_those_of_the_models() -> None:
    for name, family in FAMILIES.items():
        assert family.base_prefix == toys.toy_model(name).base_model_prefix, name


def test_every_gguf_architecture_is_a_family() -> None:
    assert {architecture.model_type for architecture in GGUF_ARCHITECTURES.values()} <= FAMILIES.keys()
