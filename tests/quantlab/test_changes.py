"""The table of changes: equal rows are one, and what is noted of a linear names its layer."""

from typing import Any

from quantlab.changes import Change, Changes, places

NOTE = "rtn: X^T X is not positive definite at any damping"


def linear(layer: int, name: str = "mlp.down_proj", note: str = "") -> Change:
    return Change(f"model.layers.{layer}.{name}", "swapped", "w4-gptq", 4, 64, "weight_only", 256, note=note)


def table_of(*rows: Change) -> list[dict[str, Any]]:
    return Changes("w4-gptq", rows, 10_000).summary()["table"]


def test_a_noted_linear_has_a_row_that_names_its_layer() -> None:
    table = table_of(*(linear(layer, note=NOTE if layer == 7 else "") for layer in range(10)))
    assert [(row["count"], row.get("layers"), row.get("note")) for row in table] == [
        (9, None, None),
        (1, "7", NOTE),
    ]
    assert {row["name"] for row in table} == {"model.layers.*.mlp.down_proj"}


def test_layers_with_the_same_note_are_one_row_in_rising_order() -> None:
    (row,) = table_of(*(linear(layer, note=NOTE) for layer in (10, 0, 3, 4, 5, 6, 7)))
    assert (row["count"], row["layers"]) == (7, "0, 3-7, 10")


def test_a_noted_expert_keeps_its_own_number() -> None:
    rows = table_of(linear(1, "mlp.experts.5.up_proj", NOTE), linear(2, "mlp.experts.5.up_proj", NOTE))
    assert [(row["name"], row["layers"]) for row in rows] == [("model.layers.*.mlp.experts.5.up_proj", "1-2")]


def test_a_noted_linear_outside_layers_goes_by_its_name() -> None:
    (row,) = table_of(Change("project", "swapped", "w4-gptq", 4, 64, note=NOTE))
    assert row["name"] == "project" and "layers" not in row


def test_places_are_named_by_layers_in_few_words() -> None:
    names = [f"model.layers.{layer}.{name}" for layer in (0, 1, 2) for name in ("attn.q", "attn.k")]
    assert places(["model.layers.7.mlp.down_proj"]) == "layer 7: mlp.down_proj"
    assert places(names) == "layers 0-2: attn.q, attn.k"
    assert (
        places([*names, "model.layers.1.mlp.up", "head"])
        == "layers 0-2: attn.q, attn.k; layer 1: mlp.up; head"
    )
