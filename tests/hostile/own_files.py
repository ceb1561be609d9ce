"""Bad files of our own and of users: names, run files, texts, HellaSwag rows, records (B16, B20, B28-B30)."""

# ruff: noqa: E501  a case, a line

import json
import os
from pathlib import Path
from typing import Any

from quantlab.records import fingerprint
from tests.hostile.case import Case, Damage, written

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(ord(last) + 1)}: &{chr(ord(last) + 1)} [{','.join(['*' + last] * 9)}]\n" for last in "abcdefghij"
)
"""Nine lists of nine lists of nine ..., ten deep: three billion leaves."""


def named(name: str) -> Damage:
    """Nothing is written; a name is asked for."""
    return lambda it: name


def alone(name: str, content: bytes | str | Any) -> Damage:
    """One file, which is opened itself."""

    def damage(it: Path) -> Path:
        written(name, content)(it)
        return it / name

    return damage


def folder(name: str) -> Damage:
    """A folder of this name, without a checkpoint in it."""

    def damage(it: Path) -> Path:
        (it / name).mkdir()
        return it / name

    return damage


def _run(name: str, text: bytes | str, says: str, classes: str = "B16") -> Case:
    return Case(name, classes, alone("run.yaml", text), says, base="empty", verb="run", tools=())


def _big(it: Path) -> Path:
    (it / "run.yaml").write_text("# " + "x" * 200 + "\n", encoding="utf-8")
    with (it / "run.yaml").open("a") as file:
        file.truncate(1 << 30)
    return it / "run.yaml"


def _pipe(name: str) -> Damage:
    def damage(it: Path) -> Path:
        os.mkfifo(it / name)
        return it / name

    return damage


RUNS = [
    _run("aliases that explode", BOMB, "alias|larger|must"),
    _run("aliases that explode within a section", "checkpoints:\n" + "".join(f"  {line}\n" for line in BOMB.splitlines()), "alias|larger|must"),
    _run("an alias of itself", "checkpoints: &a [*a]\n", "alias|nested|must"),
    _run("a python object", "name: !!python/object/apply:os.system ['touch canary']\n", "must be YAML"),
    _run("a python module", "!!python/module:os\n", "must be YAML"),
    _run("an include", "checkpoints: !include other.yaml\n", "must be YAML"),
    _run("a key twice", "name: a\nname: b\ncheckpoints: []\n", "twice"),
    _run("an unknown key", "chekpoints: []\n", "checkpoints"),
    _run("nested 50,000 deep", "a: " + "[" * 50_000, "must be YAML|nested|larger"),
    _run("not UTF-8", b"\xff\xfe\x00", "must be readable text"),
    _run("NaN bits", "checkpoints: [{path: x}]\nquantize: {widths: {a: .nan}}\n", "must|bits|widths"),
    _run("a list", "- a\n", "must hold a mapping"),
    _run("a date as a name", "checkpoints: [{path: 2020-01-01}]\n", "path"),
    Case("run file of 1 GB", "B16 B17", _big, "must hold at most", base="empty", verb="run", tools=()),
    Case("run file a pipe", "B16 B19", _pipe("run.yaml"), "must be a regular file", base="empty", verb="run", tools=()),
    Case("run file /dev/zero", "B16 B19", lambda it: Path("/dev/zero"), "must be a regular file", base="empty", verb="run", tools=()),
]  # fmt: skip

NAMES = [
    Case("id with an escape", "B20", named("a/\x1b[2Jb"), "checkpoint", base="empty"),
    Case("id that turns text around", "B20", named("a/\u202egpj.exe"), "checkpoint", base="empty"),
    Case("id with a NUL", "B20", named("a/b\0c"), "checkpoint", base="empty"),
    Case("id of 4 KB", "B20", named("a/" + "b" * 4096), "checkpoint", base="empty"),
    Case("id of a megabyte", "B20", named("x" * 2**20), "checkpoint", base="empty"),
    Case("id with a line break", "B20", named("a/b\nquantlab: all is well"), "checkpoint", base="empty"),
    Case("id with <script>", "B20", named("<script>alert(1)</script>"), "checkpoint not found", base="empty"),
    Case("id of ../", "B20", named("../../nowhere"), "checkpoint not found", base="empty"),
    Case("id that is a formula", "B20", named("=cmd|'/c calc'!A0"), "checkpoint not found", base="empty"),
    Case("id of a lone surrogate", "B20", named("a/\udcff"), "checkpoint", base="empty"),
    Case("id that is empty", "B20", named(""), "checkpoint|must|is not", base="empty"),
    Case("package outside its package", "B20 B8", named("package://quantlab/../../../etc"), "package://NAME/FILE", base="empty"),
    Case("package that is not installed", "B20", named("package://no_such_thing/x"), "is not installed", base="empty"),
    Case("package of a path", "B20", named("package:///etc/passwd"), "package://NAME/FILE", base="empty"),
    Case("folder named with an escape", "B20", folder("\x1b]0;evil\x07\x1b[2J"), "checkpoint", base="empty"),
    Case("folder named in two lines", "B20", folder("a\nquantlab: all is well"), "checkpoint", base="empty"),
    Case("folder that turns text around", "B20", folder("\u202ecod.exe"), "checkpoint", base="empty"),
]  # fmt: skip

ROW = {
    "activity_label": "A",
    "ctx_a": "He runs.",
    "ctx_b": "he",
    "endings": ["a.", "b.", "c.", "d."],
    "label": "1",
}


def _rows(name: str, says: str, **changes: Any) -> Case:
    rows = [ROW, ROW | changes]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return Case(name, "B28", alone("rows.jsonl", text), says, base="empty", verb="hellaswag", tools=())


def _text(name: str, classes: str, content: bytes, says: str) -> Case:
    return Case(name, classes, alone("text.txt", content), says, base="empty", verb="text", tools=())


DATA = [
    _rows("row with three endings", "row 2 .* 4 endings, found 3", endings=["a", "b", "c"]),
    _rows("row with label 7", "row 2 .* label from 0 to 3", label="7"),
    _rows("row with label -1", "row 2 .* label from 0 to 3", label=-1),
    _rows("row with an empty ending", "row 2 .* nothing left of ending 0", endings=["[x]", "b", "c", "d"]),
    _rows("row whose context is a number", "row 2 .* must hold text", ctx_a=3),
    Case("row nested 100,000 deep", "B28 B17", alone("rows.jsonl", b"[" * 100_000), "row 1 .* is not JSON", base="empty", verb="hellaswag", tools=()),
    Case("rows a pipe", "B28 B19", _pipe("rows.jsonl"), "must be readable", base="empty", verb="hellaswag", tools=()),
    Case("rows /dev/zero", "B28 B19", lambda it: ((it / "rows.jsonl").symlink_to("/dev/zero"), it / "rows.jsonl")[1],
         "must be readable", base="empty", verb="hellaswag", tools=()),
    Case("rows no parquet", "B28", alone("rows.parquet", b"PAR1" + bytes(50) + b"PAR1"), "must be Parquet", base="empty", verb="hellaswag", tools=()),
    _text("text not UTF-8", "B17", b"\xff\xfe", "must be UTF-8"),
    _text("text empty", "B17", b" \n", "must not be empty"),
    Case("text a pipe", "B19", _pipe("text.txt"), "must be readable", base="empty", verb="text", tools=()),
    Case("text /dev/zero", "B19", lambda it: Path("/dev/zero"), "must be readable", base="empty", verb="text", tools=()),
]  # fmt: skip


def sealed(body: dict[str, Any], schema: Any = 1) -> bytes:
    """A file of ours with a checksum that is right, whatever it says."""
    whole = body | {"schema": schema}
    content = whole | {"checksum": fingerprint(whole)}
    return (json.dumps(content, sort_keys=True, indent=1) + "\n").encode()


def _report(name: str, says: str, *files: tuple[str, bytes], classes: str = "B29") -> Case:
    def damage(it: Path) -> None:
        (it / "records").mkdir()
        for place, content in files:
            written(place, content)(it)

    return Case(name, classes, damage, says, base="empty", verb="report", tools=())


KEY = "0" * 64
RECORD = f"records/{KEY}.json"

RECORDS = [
    _report("record of version 0", "is of format 0", (RECORD, sealed({"kind": "profile"}, schema=0))),
    _report("record of version 99", "is of format 99", (RECORD, sealed({"kind": "profile"}, schema=99))),
    _report("record of a version in words", "is of format 'new'", (RECORD, sealed({"kind": "profile"}, schema="new"))),
    _report("record cut", "not a sealed JSON object", (RECORD, sealed({"kind": "profile"})[:-20])),
    _report("record empty", "not a sealed JSON object", (RECORD, b"")),
    _report("record nested 100,000 deep", "not a sealed JSON object", (RECORD, b"[" * 100_000), classes="B29 B17"),
    _report("record not UTF-8", "not a sealed JSON object", (RECORD, b"\xff"), classes="B29 B17"),
    _report("run.json of version 99", "is of format 99", ("run.json", sealed({"records": []}, schema=99))),
    _report("run.json whose records lie outside", "its records are not keys", ("run.json", sealed(
        {"config": {}, "config_fingerprint": "", "records": ["../../outside/x"]})), ("../outside/x.json", b"{}"), classes="B29 B8"),
    _report("run.json whose records are numbers", "its records are not keys", ("run.json", sealed(
        {"config": {}, "config_fingerprint": "", "records": [3]}))),
    Case("record a pipe", "B29 B19", lambda it: ((it / "records").mkdir(), os.mkfifo(it / RECORD), None)[2], "a record must be a file",
         base="empty", verb="report", tools=()),
    _report("no records", "at least one whole record"),
]  # fmt: skip

CASES = [*RUNS, *NAMES, *DATA, *RECORDS]
