"""HellaSwag's rows: preprocessing, selection, and the rows that are refused."""

import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from quantlab.config import HellaSwagConfig
from quantlab.data.hellaswag import load_documents, load_hellaswag, preprocess, select
from quantlab.errors import DataError

ROW: dict[str, Any] = {
    "activity_label": "Baking",
    "ctx_a": "[header] How to bake [title] Mix.",
    "ctx_b": "she",
    "endings": ["stirs  twice.", "[step] Waits.", "sings.", "leaves. [title] End."],
    "label": 2,
}


def jsonl(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    path = folder / name
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(lzma.compress(content) if name.endswith(".xz") else content)
    return path


def test_the_shipped_split_is_whole_and_unchanged() -> None:
    dataset = load_hellaswag()
    assert len(dataset.documents) == 10_042
    assert dataset.sha256 == "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
    assert [document.position for document in dataset.documents[:3]] == [0, 1, 2]
    first = dataset.documents[0]
    assert first.query == "Roof shingle removal: A man is sitting on a roof. He"
    assert first.endings[3] == "starts pulling up roofing on a roof." and first.label == 3


def test_every_document_is_preprocessed_as_by_lm_evaluation_harness() -> None:
    utils = pytest.importorskip("lm_eval.tasks.hellaswag.utils")
    packed = Path("quantlab/data/files/hellaswag_val.jsonl.xz")
    rows = [json.loads(line) for line in lzma.decompress(packed.read_bytes()).decode().splitlines()]
    for row, document in zip(rows, load_documents(), strict=True):
        context = row["activity_label"] + ": " + row["ctx_a"] + " " + row["ctx_b"].capitalize()
        assert document.query == utils.preprocess(context)
        assert document.endings == tuple(utils.preprocess(ending) for ending in row["endings"])
        assert document.label == int(row["label"])


def test_blanks_that_brackets_leave_stay(tmp_path: Path) -> None:
    document = load_documents(jsonl(tmp_path, [ROW]))[0]
    assert document.query == "Baking: How to bake. Mix. She"
    assert document.endings == ("stirs twice.", " Waits.", "sings.", "leaves.. End.")
    assert preprocess("  a [x] b [y]  ") == "a b "


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.xz", "rows.parquet"])
def test_a_users_file_is_read_in_every_format(tmp_path: Path, name: str) -> None:
    # The hub's Parquet files hold the label as text.
    rows = [ROW | {"ctx_b": f"she {number}", "label": str(number)} for number in range(4)]
    if name.endswith(".parquet"):
        path = tmp_path / name
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path = jsonl(tmp_path, rows, name)
    dataset = load_hellaswag(path)
    assert [document.label for document in dataset.documents] == [0, 1, 2, 3]
    assert dataset.documents[3].query.endswith("She 3") and dataset.source == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 4}, "must hold a label from 0 to 3, found 4"),
        ({"label": ""}, "must hold a label from 0 to 3, found ''"),
        ({"label": True}, "must hold a label from 0 to 3, found True"),
        ({"label": None}, "must hold a label from 0 to 3, found None"),
        ({"endings": ROW["endings"][:3]}, "must hold a list of 4 endings, found 3"),
        ({"endings": "abcd"}, "must hold a list of 4 endings, found 'abcd'"),
        ({"endings": ["a", "b", "c", 4]}, "must hold text in every ending"),
        ({"endings": ["a", "b", "[step]", "d"]}, "has nothing left of ending 2"),
        ({"ctx_a": None}, "must hold text under 'ctx_a', found None"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = jsonl(tmp_path, [ROW, ROW | change, ROW])
    with pytest.raises(DataError, match=rf"row 2 of .*rows\.jsonl {message}"):
        load_documents(path)


@pytest.mark.parametrize("key", ROW)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    row = {name: value for name, value in ROW.items() if name != key}
    with pytest.raises(DataError, match=f"row 1 of .* lacks the key '{key}'"):
        load_documents(jsonl(tmp_path, [row]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}\n{", "row 1 .* lacks the key"),
        (json.dumps(ROW).encode() + b"\n{\n", "row 2 .* is not JSON"),
        (json.dumps(ROW).encode() + b"\n\n" + json.dumps(ROW).encode(), "row 2 .* is not JSON"),
        (b"[" * 100_000, "row 1 .* is not JSON"),
        (b"[1]\n", "row 1 .* must be an object, found list"),
        (b"", "at least one document"),
        (b"\xff\n", "must be UTF-8"),
    ],
)
def test_content_that_is_not_rows_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_documents(path)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must end in \.jsonl, \.jsonl\.xz or \.parquet, found .*rows\.csv"):
        load_documents(tmp_path / "rows.csv")
    with pytest.raises(DataError, match="must exist"):
        load_documents(tmp_path / "rows.jsonl")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="must be Parquet"):
        load_documents(tmp_path / "rows.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([], schema=pyarrow.schema([])), tmp_path / "none.parquet")
    with pytest.raises(DataError, match="at least one document"):
        load_documents(tmp_path / "none.parquet")


def test_a_limit_cuts_one_fixed_permutation() -> None:
    documents = load_documents()
    small, large = (
        [document.position for document in select(documents, HellaSwagConfig(limit=limit))]
        for limit in (64, 200)
    )
    assert len(small) == 64 and set(small) < set(large) and small == sorted(small)
    # Written down once: the demo's documents never change.
    assert small[:5] == [87, 282, 392, 404, 923]
    # The file begins with 3,000 documents of one kind; the permutation reaches the others too.
    assert sum(position >= 3000 for position in small) > 32
    assert select(documents, HellaSwagConfig(limit=64, seed=1)) != select(
        documents, HellaSwagConfig(limit=64)
    )
    assert select(documents, HellaSwagConfig(limit=len(documents))) == documents


@pytest.mark.parametrize(
    ("items", "expected"), [("2:5", [2, 3, 4]), (":2", [0, 1]), ("10040:", [10040, 10041]), ("0:1", [0])]
)
def test_items_are_positions_in_the_file(items: str, expected: list[int]) -> None:
    chosen = select(load_documents(), HellaSwagConfig(items=items))
    assert [document.position for document in chosen] == expected


@pytest.mark.parametrize("items", ["5:5", "7:3", "0:10043", "10042:"])
def test_items_outside_the_file_are_refused(items: str) -> None:
    with pytest.raises(DataError, match=f"the file has 10042, items is '{items}'"):
        select(load_documents(), HellaSwagConfig(items=items))


def test_a_limit_beyond_the_file_is_refused() -> None:
    with pytest.raises(DataError, match="the file has 10042, limit is 10043"):
        select(load_documents(), HellaSwagConfig(limit=10_043))
