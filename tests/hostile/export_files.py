"""Bad folders of our own exports: quantlab's format, other formats' tensors, MANIFEST, recipe (B12, B13, B17, B19, B25, B29).

`verify` opens them by the MANIFEST, which is sealed anew around most damages: a seal is no signature. What is in
quantlab's format or in compressed-tensors is a checkpoint too, which `profile` and `evaluate` open.
"""

# ruff: noqa: E501  a case, a line

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from quantlab.manifest import MANIFEST, _seal, _text, write_manifest
from tests.hostile.case import CONFIG, WEIGHTS, Case, Damage, both, changed, linked, sparse, without, written
from tests.hostile.tensors import added, poked, replaced

OURS, TABLES, BLOCKS, GPTQ, NF4, PACKED = "ours", "tables", "blocks", "gptq", "nf4", "compressed"
"""Bases: exports of the toy Llama."""
HUGE = 2**40


def resealed(*damages: Damage) -> Damage:
    """Damages, and a MANIFEST of what the folder holds then; digests of codes stay those that were chosen."""

    def damage(it: Path) -> None:
        body = json.loads((it / MANIFEST).read_text())
        for step in damages:
            step(it)
        written_anew = ("format_version", "quantlab", "files", "seal")
        write_manifest(it, {name: value for name, value in body.items() if name not in written_anew})

    return damage


def listed(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change the MANIFEST and seal it."""

    def damage(it: Path) -> None:
        body = json.loads((it / MANIFEST).read_text())
        body.pop("seal")
        change(body)
        (it / MANIFEST).write_text(_text(body | {"seal": _seal(body)}))

    return damage


def respelled(before: bytes, after: bytes) -> Damage:
    """Other bytes at the first place of some in the MANIFEST."""

    def damage(it: Path) -> None:
        text = (it / MANIFEST).read_bytes()
        assert before in text
        (it / MANIFEST).write_bytes(text.replace(before, after, 1))

    return damage


def quantization(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change the quantization_config."""

    def damage(it: Path) -> None:
        tree = json.loads((it / CONFIG).read_text())
        change(tree["quantization_config"])
        (it / CONFIG).write_text(json.dumps(tree))

    return damage


def settings(**changes: Any) -> Damage:
    """Change keys of the quantization_config."""
    return quantization(lambda config: config.update(changes))


def linear(**changes: Any) -> Damage:
    """Change what the quantization_config says of its first linear."""
    return quantization(lambda config: config["linears"][min(config["linears"])].update(changes))


def renamed(name: str) -> Damage:
    """The first linear goes by another name."""
    return quantization(
        lambda config: config["linears"].update({name: config["linears"].pop(min(config["linears"]))})
    )


def table(found: Any) -> Damage:
    """Another table of values."""
    return settings(tables={"nf4": found})


def factors(*found: Any) -> Damage:
    """Other factors of every rotation."""
    return quantization(
        lambda config: config.update(rotations={size: list(found) for size in config["rotations"]})
    )


def numbers(values: Any) -> dict[str, Any]:
    """Numbers as config.json holds them."""
    array = np.asarray(values, "<f4")
    return {"shape": list(array.shape), "float32": array.tobytes().hex()}


def stated(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change the state that a linear of bitsandbytes carries."""

    def edited(array: Any) -> Any:
        state = json.loads(array.tobytes().decode())
        replaced_by = change(state)
        text = json.dumps(state).encode() if not isinstance(replaced_by, bytes) else replaced_by
        return np.frombuffer(text, np.uint8)

    return replaced("quant_state.bitsandbytes__nf4", edited)


def _verified(name: str, classes: str, damage: Damage, says: str, base: str = OURS) -> Case:
    return Case(f"{base} verified: {name}", classes, damage, says, base=base, verb="verify", tools=())


def _both(
    name: str, classes: str, damage: Damage, says: str, base: str = OURS, *, loads: bool = True
) -> list[Case]:
    """Opened by verify, and as a checkpoint by profile (in blocks, evaluate)."""
    verb = "evaluate" if base == BLOCKS or "B12" in classes else "profile"
    return [
        _verified(name, classes, resealed(damage), says, base),
        Case(f"{base} opened: {name}", classes, damage, says, base=base, loads=loads, verb=verb, tools=()),
    ]


def _told(name: str, classes: str, damage: Damage, says: str, base: str = OURS) -> list[Case]:
    """Told by config.json alone."""
    return _both(name, classes, damage, says, base, loads=False)


AS_FORMAT = "a tensor must be as its format has it"
CONFIGS = [
    *(case for bits in (0, 1, 9, 63, True, "4") for case in _told(f"{bits!r} bits", "B13", linear(bits=bits), "must have 2 to 8 bits")),
    *_told("group size 0", "B13", linear(scale=[64, 0]), "must have a scale of two sizes"),
    *_told("groups that do not divide", "B13", linear(scale=[64, 7]), "must have scales that divide"),
    *_told("groups of other rows", "B13", linear(scale=[63, 3]), "must have scales that divide"),
    *_told("shape 2^40", "B12 B13", linear(shape=[HUGE, HUGE]), "must have a shape of two sizes"),
    *_told("shape negative", "B12 B13", linear(shape=[-64, 96]), "must have a shape of two sizes"),
    *_told("shape of floats", "B12 B13", linear(shape=[64.0, 96.0]), "must have a shape of two sizes"),
    *_told("shape of three", "B12 B13", linear(shape=[64, 96, 1]), "must have a shape of two sizes"),
    *_told("shape 2^30", "B12 B13", linear(shape=[2**30, 2**30], scale=[2**30, 1]), f"must agree with the config|{AS_FORMAT}"),
    *_told("shape of another linear", "B12 B13", linear(shape=[96, 64], scale=[96, 2]), f"must agree with the config|{AS_FORMAT}"),
    *_told("kind unknown", "B13", linear(kind="evil"), "must be one of affine"),
    *_told("kind a list", "B13", linear(kind=["affine"]), "must be one of affine"),
    *_told("version 2", "B29 B13", settings(version=2), "is read in version 1"),
    *_told("version true", "B29 B13", settings(version=True), "is read in version 1"),
    *_told("no version", "B29 B13", settings(version=None), "is read in version 1"),
    *_told("no linears", "B13", settings(linears={}), "must describe 1 to"),
    *_told("linears a list", "B13", settings(linears=[]), "must describe 1 to"),
    *_told("linear with an escape", "B20 B13", renamed("\x1b[2J\n"), "printable name"),
    *_told("linear of a megabyte", "B20 B13", renamed("x" * 2**20), "printable name"),
    *_told("same as itself", "B13", linear(kind="same", **{"as": "model.layers.0.mlp.down_proj"}), "must be the same as a linear"),
    *_told("same as none", "B13", linear(kind="same", **{"as": "../x"}), "must be the same as a linear"),
    *_told("block unknown", "B13", linear(block="Q9_X"), "must name a block", BLOCKS),
    *_told("block of other bits", "B13", linear(bits=8), "bits and scales of Q4_1", BLOCKS),
    *_told("block of other scales", "B13", linear(scale=[64, 1]), "bits and scales of Q4_1", BLOCKS),
    Case("ours opened: no scheme", "B13", settings(scheme=None), "must name a scheme", base=OURS, tools=()),
    Case("ours opened: scheme of 16 bits", "B13", settings(scheme="w16"), "must name a scheme", base=OURS, tools=()),
    Case("ours opened: scheme of a megabyte", "B13 B20", settings(scheme="w4" * 2**19), "must name a scheme", base=OURS, tools=()),
]  # fmt: skip

TENSORS = [
    *_both("linear that is not there", "B12 B13", renamed("model.layers.0.mlp.evil"), "lacks a tensor|must be those of linears|no place for"),
    *_both("linear of ../", "B20 B13", renamed("../../outside/x"), "lacks a tensor|must be those of linears|no place for"),
    *_both("codes too few", "B5 B13", replaced(".codes", lambda array: array[:, :-1]), AS_FORMAT),
    *_both("codes of too few rows", "B12 B13", replaced(".codes", lambda array: array[:-1]), AS_FORMAT),
    *_both("codes of one dimension", "B12 B13", replaced(".codes", lambda array: array.reshape(-1)), AS_FORMAT),
    *_both("codes as int8", "B7 B13", replaced(".codes", lambda array: array.view(np.int8)), AS_FORMAT),
    *_both("no codes", "B12 B13", replaced(".codes", lambda array: None), "lacks a tensor"),
    *_both("no scales", "B12 B13", replaced(".scale", lambda array: None), "lacks a tensor"),
    *_both("scale NaN", "B25 B13", poked(".scale", float("nan")), "scales must be finite"),
    *_both("scale Inf", "B25 B13", poked(".scale", float("inf")), "scales must be finite"),
    *_both("scale beyond float32", "B25 B13", replaced(".scale", lambda array: array.astype(np.float64) * 1e300), "scales must be finite"),
    *_both("scales of whole numbers", "B7 B13", replaced(".scale", lambda array: array.astype(np.int32)), "tensor of floats was expected"),
    *_both("scales of another shape", "B12 B13", replaced(".scale", lambda array: array.T), AS_FORMAT),
    *_both("zero points too few", "B12 B13", replaced(".zero_point", lambda array: array[:, :0]), AS_FORMAT),
    *_both("zero points of no kind", "B13", linear(zero_point="evil"), "whole or real"),
    *_both("a tensor that no entry speaks of", "B13", added("model.layers.0.mlp.down_proj.dmin", np.zeros((64, 3), np.float16)), "must speak of its dmin"),
    *_both("table missing", "B13", settings(tables={}), "must name a table", TABLES),
    *_both("table of a list", "B13", settings(tables=[1]), "must name a table", TABLES),
    *_both("table too short", "B13", table(numbers(np.zeros(8))), "must have a table of 16 values", TABLES),
    *_both("table of 2^40 values", "B13", table({"shape": [HUGE], "float32": ""}), "must have a shape of 1 to 256", TABLES),
    *_both("table of -16 values", "B13", table({"shape": [-16], "float32": ""}), "must have a shape of 1 to 256", TABLES),
    *_both("table whose digits are none", "B13", table({"shape": [16], "float32": "xy" * 64}), "must be hexadecimal", TABLES),
    *_both("table whose digits are blanks", "B13", table({"shape": [16], "float32": "00" * 60 + " " * 8}), "must be hexadecimal", TABLES),
    *_both("table of another length", "B13", table({"shape": [16], "float32": "00" * 63}), "must hold 8 hexadecimal digits", TABLES),
    *_both("scales of no type", "B13", linear(scale_type="evil"), "scales of float, e8m0 or e4m3", TABLES),
    *_both("block scale Inf", "B25 B13", poked(".d", float("inf"), 3), "scales must be finite", BLOCKS),
    *_both("block minimum NaN", "B25 B13", poked(".dmin", float("nan"), 3), "scales must be finite", BLOCKS),
    *_both("blocks too few", "B12 B13", replaced(".d", lambda array: array[:, :-1]), AS_FORMAT, BLOCKS),
    Case("ours opened: scheme of a linear that is none", "B13", linear(weights="evil"), "must name the scheme of its weights", base=OURS, loads=True, tools=()),
    Case("ours opened: rotation missing", "B13", settings(rotations={}), "must be a list of factors", base=OURS, loads=True, tools=()),
    Case("ours opened: rotation of 2^40", "B13", factors({"shape": [HUGE, HUGE], "float32": ""}), "must have a shape of 1 to", base=OURS, loads=True, tools=()),
    Case("ours opened: rotation of 2^24 rows", "B13", factors({"shape": [2**24, 2**24], "float32": ""}), "8 hexadecimal digits", base=OURS, loads=True, tools=()),
    Case("ours opened: rotation of zeros", "B13", factors(numbers(np.zeros((64, 64)))), "orthogonal factors", base=OURS, loads=True, tools=()),
    Case("ours opened: rotation NaN", "B13 B25", factors(numbers(np.full((64, 64), np.nan))), "orthogonal factors", base=OURS, loads=True, tools=()),
    Case("ours opened: rotation Inf", "B13 B25", factors(numbers(np.full((64, 64), np.inf))), "orthogonal factors", base=OURS, loads=True, tools=()),
    Case("ours opened: rotation not square", "B13", factors(numbers(np.eye(64)[:32])), "square factors", base=OURS, loads=True, tools=()),
    Case("ours opened: rotation of another size", "B13", factors(numbers(np.eye(32))), "multiply to its size", base=OURS, loads=True, tools=()),
    Case("ours opened: rotation of 100,000 factors", "B13", factors(*[1] * 100_000), "must be a list of factors", base=OURS, loads=True, tools=()),
    _verified("scale negative", "B13 B26", resealed(replaced(".scale", np.negative)), "scales must be those that the quantizer chose"),
    _verified("one code changed", "B13", resealed(poked(".codes", 3)), "codes must be those that the quantizer chose"),
]  # fmt: skip


def _state(name: str, change: Callable[[dict[str, Any]], Any], says: str) -> Case:
    return _verified(name, "B13 B12", resealed(stated(change)), says, NF4)


OTHERS = [
    _verified("packed words too few", "B13 B5", resealed(replaced("weight_packed", lambda array: array[:, :-1])), "packed words must fit", PACKED),
    _verified("shape of 2^40", "B13 B12", resealed(replaced("weight_shape", lambda array: array * 0 + HUGE)), "packed words must fit", PACKED),
    _verified("shape negative", "B13 B12", resealed(replaced("weight_shape", lambda array: -array)), "packed words must fit", PACKED),
    _verified("shape of three", "B13 B12", resealed(replaced("weight_shape", lambda array: np.ones(3, np.int64))), AS_FORMAT, PACKED),
    _verified("scales of another shape", "B13 B12", resealed(replaced("weight_scale", lambda array: array.T)), "scales must be one", PACKED),
    _verified("no scales", "B13 B12", resealed(replaced("weight_scale", lambda array: np.zeros((0, 0), np.float32))), "scales must be one", PACKED),
    _verified("63 bits", "B13", resealed(quantization(lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=63))), "1 to 8 bits", PACKED),
    _verified("bits of another number", "B13", resealed(quantization(lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=5))), "packed words must fit", PACKED),
    _verified("no groups", "B13", resealed(settings(config_groups={})), "one group of weights", PACKED),
    _verified("qweight of one dimension", "B13 B12", resealed(replaced("qweight", lambda array: array.reshape(-1))), "two dimensions", GPTQ),
    _verified("qweight too short", "B13 B5", resealed(replaced("qweight", lambda array: array[:-4])), AS_FORMAT, GPTQ),
    _verified("qweight of other columns", "B13 B12", resealed(replaced("qweight", lambda array: array[:, :32])), AS_FORMAT, GPTQ),
    _verified("qzeros too few", "B13 B12", resealed(replaced("qzeros", lambda array: array[:-1])), AS_FORMAT, GPTQ),
    _verified("zero point beyond the grid", "B13 B26", resealed(settings(checkpoint_format="gptq"), replaced("qzeros", lambda array: array * 0 - 1)), "beyond the grid", GPTQ),
    _verified("scales too few", "B13 B12", resealed(replaced("scales", lambda array: array[:-1])), AS_FORMAT, GPTQ),
    _verified("g_idx out of range", "B13 B12", resealed(added("model.layers.0.mlp.down_proj.g_idx", np.full(96, 2**31 - 1, np.int32))), "g_idx scatters", GPTQ),
    _verified("g_idx negative", "B13 B12", resealed(added("model.layers.0.mlp.down_proj.g_idx", np.full(96, -1, np.int32))), "g_idx scatters", GPTQ),
    _verified("63 bits", "B13", resealed(settings(bits=63)), "bits must be 2 to 8", GPTQ),
    _verified("group size 0", "B13", resealed(settings(group_size=0)), "group_size must be", GPTQ),
    _verified("group size 2^40", "B13", resealed(settings(group_size=HUGE)), "group_size must be", GPTQ),
    _verified("group size 7", "B13", resealed(settings(group_size=7)), "do not divide", GPTQ),
    _state("blocksize 0", lambda state: state.update(blocksize=0), "blocksize must be"),
    _state("blocksize 2^40", lambda state: state.update(blocksize=HUGE), "blocksize must be"),
    _state("blocksize 7", lambda state: state.update(blocksize=7), "must fill their matrix"),
    _state("shape of 2^40", lambda state: state.update(shape=[HUGE, HUGE]), "must fill their matrix"),
    _state("shape negative", lambda state: state.update(shape=[-64, -96]), "must tell its matrix's shape"),
    _state("shape of three", lambda state: state.update(shape=[64, 96, 1]), "must tell its matrix's shape"),
    _state("nested blocksize 0", lambda state: state.update(nested_blocksize=0), "nested_blocksize must be"),
    _state("offset of 400 digits", lambda state: state.update(nested_offset=10**400), "must have an offset"),
    _state("offset NaN", lambda state: state.update(nested_offset=float("nan")), "must have an offset"),
    _state("state cut", lambda state: b'{"shape": [64', "must carry its state"),
    _state("state nested", lambda state: b"[" * 4000, "must carry its state"),
    _state("state of a megabyte", lambda state: b" " * 2**20, "must carry its state"),
    _state("state not UTF-8", lambda state: b"\xff\xfe", "must carry its state"),
    _verified("absmax too few", "B13 B12", resealed(replaced("weight.absmax", lambda array: array[:-1])), AS_FORMAT, NF4),
    _verified("table of 8 values", "B13 B12", resealed(replaced("weight.quant_map", lambda array: array[:8])), AS_FORMAT, NF4),
    _verified("nested scales Inf", "B13 B25", resealed(poked("weight.nested_absmax", float("inf"), 0)), "scales must be finite", NF4),
]  # fmt: skip


def _files(change: Callable[[dict[str, Any]], Any]) -> Damage:
    return listed(lambda body: change(body["files"]))


def _first(**changes: Any) -> Damage:
    return _files(lambda files: files[min(files)].update(changes))


def _pipe(name: str) -> Damage:
    def damage(it: Path) -> None:
        (it / name).unlink(missing_ok=True)
        os.mkfifo(it / name)

    return damage


def _deep(it: Path) -> None:
    (it / "/".join("d" * 40)).mkdir(parents=True)


def _flipped(it: Path) -> None:
    with (it / WEIGHTS).open("r+b") as file:
        file.seek(-100, 2)
        byte = file.read(1)[0]
        file.seek(-100, 2)
        file.write(bytes([byte ^ 1]))


ENTRY = {"sha256": "0" * 64, "bytes": 4}
MANIFESTS = [
    _verified("a seal that is wrong", "B29", respelled(b'"seal": "', b'"seal": "0'), "was changed"),
    _verified("no seal", "B29", changed(MANIFEST, seal=None), "was changed"),
    _verified("a blank more", "B29", respelled(b"{", b"{ "), "was changed"),
    _verified("version 1", "B29", listed(lambda body: body.update(format_version=1)), "must be of version 2"),
    _verified("version 3", "B29", listed(lambda body: body.update(format_version=3)), "must be of version 2"),
    _verified("version of a megabyte", "B29 B20", listed(lambda body: body.update(format_version="\x1b" * 2**20)), "must be of version 2"),
    _verified("file of ../", "B8 B29", _files(lambda files: files.update({"../outside/x": ENTRY})), "must lie in its folder"),
    _verified("file of /etc/passwd", "B8 B29", _files(lambda files: files.update({"/etc/passwd": ENTRY})), "must lie in its folder"),
    _verified("file with a NUL", "B20 B29", _files(lambda files: files.update({"a\0b": ENTRY})), "lacks a file"),
    _verified("file of 5,000 letters", "B20 B29", _files(lambda files: files.update({"a" * 5000: ENTRY})), "lacks a file"),
    _verified("file with an escape", "B20 B29", _files(lambda files: files.update({"\x1b[2J\n": ENTRY})), "lacks a file"),
    _verified("file under two names", "B20 B29", _files(lambda files: files.update({f"./{WEIGHTS}": files[WEIGHTS]})), "lacks a file"),
    _verified("file that is missing", "B8 B29", without("tokenizer.json"), "lacks a file"),
    _verified("file too many", "B29", written("extra.bin", b"x"), "does not list"),
    _verified("file too many, hidden", "B29", written(".git/config", b"x"), "does not list"),
    _verified("size -1", "B29", _first(bytes=-1), "was changed"),
    _verified("size 2^63", "B29", _first(bytes=2**63), "was changed"),
    _verified("size in words", "B29", _first(bytes="4"), "must list files"),
    _verified("size a float", "B29", _first(bytes=4.0), "must list files"),
    _verified("no sizes", "B29", _files(lambda files: files.update({min(files): 3})), "must list files"),
    _verified("files a list", "B29", listed(lambda body: body.update(files=["x"])), "must list files"),
    _verified("digests a list", "B29", listed(lambda body: body.update(tensors=["x"])), "digests of codes"),
    _verified("digests of numbers", "B29", listed(lambda body: body.update(tensors={"x": 3})), "digests of codes"),
    _verified("no digests", "B29", listed(lambda body: body.pop("tensors")), "digests of its codes"),
    _verified("digests of linears that are not there", "B29", listed(lambda body: body["tensors"].update({"../x": {"codes": "", "scales": ""}})), "linears of the manifest must be in the folder"),
    _verified("no digests of its linears", "B29", listed(lambda body: body["tensors"].clear()), "linears of the folder must be in its manifest"),
    _verified("a key twice", "B17 B29", respelled(b"{", b'{"format_version": 1,'), "twice"),
    _verified("not UTF-8", "B17 B29", respelled(b'"seal"', b'"\xff"'), "is not UTF-8"),
    _verified("cut", "B17 B29", written(MANIFEST, b'{"format_version": 2, "files"'), "valid JSON"),
    _verified("empty", "B17 B29", written(MANIFEST, b""), "valid JSON"),
    _verified("a list", "B17 B29", written(MANIFEST, b"[]"), "must hold a JSON object"),
    _verified("nested 100,000 deep", "B17 B29", written(MANIFEST, b'{"a": ' + b"[" * 100_000), "valid JSON"),
    _verified("nested 300 deep", "B17 B29", listed(lambda body: body.update(a=json.loads("[" * 300 + "]" * 300))), "nested more than"),
    _verified("a million values", "B17 B29", written(MANIFEST, b'{"a": [' + b"0," * 1_600_000 + b"0]}"), "lists more than"),
    _verified("1 GB", "B17 B29", sparse(MANIFEST, 1 << 30), "plain file of at most"),
    _verified("a link", "B19 B29", linked(MANIFEST, "../outside/x"), "has no MANIFEST|plain file"),
    _verified("a pipe", "B19 B29", _pipe(MANIFEST), "has no MANIFEST|regular file"),
    _verified("a listed file is a pipe", "B19 B29", _pipe("tokenizer.json"), "must be a regular file"),
    _verified("a pipe too many", "B19 B29", _pipe("extra"), "does not list"),
    _verified("weights are a link", "B19 B29", linked(WEIGHTS, "/dev/zero"), "is a link"),
    _verified("a link to a folder", "B19 B29", linked("more", "../outside"), "is a link"),
    _verified("folders 40 deep", "B20 B29", _deep, "folders deep"),
    _verified("one bit of the weights", "B5 B29", _flipped, "was changed"),
]  # fmt: skip


def _recipe(name: str, says: str, **changes: Any) -> Case:
    return _verified(f"recipe {name}", "B29 B9", resealed(changed("recipe.json", **changes)), says)


RECIPES = [
    _recipe("of an unknown scheme", "evil", scheme="evil"),
    _recipe("of a scheme that is a number", "must name scheme", scheme=4),
    _recipe("of a scheme of a megabyte", "must name scheme", scheme="w4" * 2**19),
    _recipe("of an unknown format", "unknown format", format="../x"),
    _recipe("of a format that is a list", "must name scheme", format=["gptq"]),
    _recipe("without bits", "must name scheme", average_storage_bits=None),
    _recipe("of NaN bits", "must name scheme", average_storage_bits=float("nan")),
    _recipe("of infinite bits", "must name scheme", average_storage_bits=float("inf")),
    _recipe("of 400 digits of bits", "must name scheme", average_storage_bits=10**400),
    _recipe("of -1 bits", "must name scheme", average_storage_bits=-1),
    _recipe("of 2 bits", "must take .* bytes, by recipe.json", average_storage_bits=2),
    _verified("recipe a list", "B29 B17", resealed(written("recipe.json", b"[]")), "must hold a JSON object"),
    _verified("recipe nested", "B29 B17", resealed(written("recipe.json", b'{"a":' + b"[" * 100_000)), "valid JSON"),
    _verified("recipe a key twice", "B29 B17", resealed(written("recipe.json", b'{"scheme": 1, "scheme": 2}')), "twice"),
    _verified("no recipe", "B29 B8", resealed(without("recipe.json")), "must hold low-bit weights"),
    _verified("certificate changed", "B29", both(resealed(written("certificate.json", b"{}")), written("certificate.json", b"[]")), "was changed"),
    _verified("certificate a pipe", "B29 B19", _pipe("certificate.json"), "does not list"),
    _verified("card not UTF-8", "B29 B17", resealed(written("README.md", b"\xff\xfe"), poked(".codes", 3)), "must be UTF-8 text"),
    _verified("card a link", "B29 B19", linked("README.md", "/etc/passwd"), "is a link"),
    Case("ours opened: certificate a pipe", "B29 B19", _pipe("certificate.json"), "must be a regular file", base=OURS, verb="evaluate", tools=()),
    Case("ours opened: certificate of 1 GB", "B29 B17", sparse("certificate.json", 1 << 30), "is larger than", base=OURS, verb="evaluate", tools=()),
    Case("ours opened: recipe a link", "B29 B19", linked("recipe.json", "/etc/passwd"), "must lie in the checkpoint's folder", base=OURS, tools=()),
    Case("ours opened: auto_map", "B10 B13", changed(CONFIG, auto_map={"AutoModelForCausalLM": "x.Y"}), "run code of its own", base=OURS, verb="evaluate", tools=()),
]  # fmt: skip

GOOD = [
    Case("ours opened: as it is", "B13", lambda it: None, "", base=OURS, loads=True, verb="evaluate", tools=()),
    Case("tables opened: as it is", "B13", lambda it: None, "", base=TABLES, loads=True, verb="evaluate", tools=()),
    Case("blocks opened: as it is", "B13", lambda it: None, "", base=BLOCKS, loads=True, verb="evaluate", tools=()),
]  # fmt: skip

CASES = [*CONFIGS, *TENSORS, *OTHERS, *MANIFESTS, *RECIPES, *GOOD]
