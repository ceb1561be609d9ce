"""What is printed below a table: each note once, few of many."""

from quantlab.tables import notes_of


def row(count: int, note: str) -> dict[str, object]:
    return {"count": count, "name": "model.layers.*.mlp.down_proj", "note": note, "layers": "0"}


def test_notes_are_counted_and_the_most_frequent_come_first() -> None:
    table = [row(2, "a"), {"count": 40, "name": "model.layers.*.mlp.up_proj"}, row(1, "b"), row(3, "b")]
    assert notes_of({"table": table}) == ["b (4 linears)", "a (2 linears)"]
    assert notes_of({"table": [row(1, "a")], "notes": ["lm_head was untied"]}) == [
        "lm_head was untied",
        "a (1 linear)",
    ]
    assert notes_of({}) == []
