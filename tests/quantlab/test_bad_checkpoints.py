"""Checkpoints that must not be loaded: each ends in one sentence that says what, where, and what to do.

What names, headers and configs can tell is refused by `inspect_checkpoint`, which runs without torch; what only the
model class or the values can tell, by `load_checkpoint`, before any forward pass.
"""

import json
import os
import re
import shlex
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantlab.config import CheckpointConfig
from quantlab.errors import CheckpointError
from quantlab.inspection.checkpoint import inspect_checkpoint
from quantlab.inspection.safetensors_header import read_header
from quantlab.models.loading import load_checkpoint

Damage = Callable[[Path], None]

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(toy_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own to damage."""
    return Path(shutil.copytree(toy_folder, tmp_path / "toy"))


def inspect(path: Path | str, **options: Any) -> object:
    return inspect_checkpoint(CheckpointConfig(path=str(path), device="cpu", **options))


def load(path: Path, **options: Any) -> object:
    return load_checkpoint(CheckpointConfig(path=str(path), device="cpu", **options))


def refused(call: Callable[..., object], path: Path | str, message: str, **options: Any) -> None:
    """The call must end in one sentence, which matches."""
    with pytest.raises(CheckpointError, match=message) as caught:
        call(path, **options)
    assert "\n" not in str(caught.value)


def configured(**changes: Any) -> Damage:
    """Change config.json; None removes a key."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return damage


def reweighted(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    """Change the tensors of the one weight file."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def replaced(name: str, value: Tensor | None) -> Damage:
    """Put another tensor in a tensor's place; None removes it."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value

    return reweighted(change)


def poked(name: str, value: float) -> Damage:
    """Put one value into a tensor."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[7] = value

    return reweighted(change)


def written(name: str, blob: bytes) -> Damage:
    """Write a file."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(blob)

    return damage


def cut(num_bytes: int) -> Damage:
    """Cut the weight file short, or for a negative number lengthen it."""

    def damage(folder: Path) -> None:
        blob = (folder / WEIGHTS).read_bytes()
        kept = blob[:-num_bytes] if num_bytes > 0 else blob + bytes(-num_bytes)
        (folder / WEIGHTS).write_bytes(kept)

    return damage


def without(*names: str) -> Damage:
    """Remove files."""

    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def pickled(folder: Path) -> None:
    """Only a pickle of the weights is left."""
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def _linked_out(folder: Path) -> None:
    target = (folder / WEIGHTS).rename(folder.parent / "outside.safetensors")
    (folder / WEIGHTS).symlink_to(target)


def _renamed(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "extra.safetensors")


def _shortened(folder: Path, num_bytes: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:num_bytes])


def _made_a_folder(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def _made_a_pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


CONFIGS: dict[str, tuple[Damage, str]] = {
    "no config": (without("config.json"), r"not a checkpoint: .*toy has no config\.json"),
    "not JSON": (written("config.json", b"{"), "config.json does not hold valid JSON"),
    "not UTF-8": (written("config.json", b"\xff\xfe{}"), "config.json is not UTF-8"),
    "a list": (written("config.json", b"[]"), "must hold a JSON object, found list"),
    "nested a million deep": (written("config.json", b"[" * 1_000_000), "does not hold valid JSON"),
    "key twice": (written("config.json", b'{"a": 1, "a": 2}'), "names 'a' twice"),
    "no model_type": (configured(model_type=None), "must name its model_type"),
    "unknown architecture": (configured(model_type="lama"), "has model_type 'lama'. Did you mean 'llama'?"),
    "code of its own": (
        configured(auto_map={"AutoModelForCausalLM": "a.B"}),
        "run code of its own: .*auto_map",
    ),
    "another weight file": (
        configured(transformers_weights="../x.safetensors"),
        "must not set 'transformers_wei",
    ),
    "layers 1e7": (
        configured(num_hidden_layers=10**7),
        "num_hidden_layers must be 1 to 10000: .* has 10000000",
    ),
    "layers 0": (configured(num_hidden_layers=0), "num_hidden_layers must be 1 to 10000: .* has 0"),
    "layers as text": (
        configured(num_hidden_layers="2"),
        "num_hidden_layers must be a whole number: .* has '2'",
    ),
    "layers as truth": (
        configured(num_hidden_layers=True),
        "num_hidden_layers must be a whole number: .* has True",
    ),
    "vocab 1e12": (configured(vocab_size=10**12), "vocab_size must be 1 to 10000000: .* has 1000000000000"),
    "hidden -8": (configured(hidden_size=-8), "hidden_size must be 1 to 1000000: .* has -8"),
    "positions 1e12": (configured(max_position_embeddings=10**12), "max_position_embeddings must be 1 to"),
    "heads 0": (configured(num_attention_heads=0), "num_attention_heads must be 1 to 100000: .* has 0"),
    "experts -1": (configured(num_experts=-1), "num_experts must be 0 to 100000: .* has -1"),
    "inner sizes 1e12": (
        configured(intermediate_size=[96, 10**12]),
        "intermediate_size must be 1 to 10000000: .* has 1000000000000",
    ),
    "inner sizes as text": (
        configured(intermediate_size=[96, "96"]),
        r"intermediate_size must be a whole number, or a list of one for each layer: .* has \[96, '96'\]",
    ),
    "no inner sizes": (
        configured(intermediate_size=[]),
        r"intermediate_size must be a whole number, .* has \[\]",
    ),
    "a list of layers": (
        configured(num_hidden_layers=[2]),
        r"num_hidden_layers must be a whole number: .* has \[2\]",
    ),
    "heads do not divide": (
        configured(num_attention_heads=5, head_dim=None, num_key_value_heads=None),
        "num_attention_heads must divide hidden_size .* 5 heads for hidden_size 64",
    ),
    "key-value heads do not divide": (
        configured(num_key_value_heads=3),
        "num_key_value_heads must divide num_attention_heads: .* has 3 and 4",
    ),
    "rope as text": (configured(rope_parameters="linear"), "rope_parameters must be an object or null"),
    "an adapter": (written("adapter_config.json", b"{}"), "must be a whole model: .* holds an adapter"),
    "gptq": (
        configured(quantization_config={"quant_method": "gptq", "bits": 4}),
        "must be in floats or in compressed-tensors: .* was quantized by 'gptq'",
    ),
    "quantized by nobody": (
        configured(quantization_config={"bits": 4}),
        "was quantized by None",
    ),
    "quantized activations": (
        configured(
            quantization_config={
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {}, "input_activations": {"num_bits": 8}}},
            }
        ),
        "must hold weights alone: .* quantizes activations",
    ),
    "quantized without saying how": (
        configured(quantization_config={"quant_method": "compressed-tensors", "config_groups": {"g": {}}}),
        "quantization_config must describe its weights",
    ),
}

FILES: dict[str, tuple[Damage, str]] = {
    "no weights": (
        without(WEIGHTS),
        "must hold its weights in model.safetensors or in shards .* no safetensors",
    ),
    "other weights": (
        _renamed,
        r"its safetensors files are extra\.safetensors",
    ),
    "a pickle": (
        pickled,
        r"must be safetensors: .*pytorch_model\.bin is a pickle, .* convert it: python -c '",
    ),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "must hold its tokenizer"),
    "weights in a link": (
        _linked_out,
        "weights must lie in the checkpoint's folder: .* is a link to",
    ),
    "truncated": (cut(1000), "is damaged: .*model.safetensors holds .* it is truncated. Get the file again"),
    "truncated in its header": (lambda folder: _shortened(folder, 100), "it is truncated"),
    "empty": (written(WEIGHTS, b""), "holds 0 bytes"),
    "too long": (cut(-5), "holds 5 bytes after its last tensor"),
    "a folder": (_made_a_folder, "must be a regular file"),
    "a pipe": (_made_a_pipe, "must be a regular file"),
}


SHAPES: dict[str, tuple[Damage, str]] = {
    "embedding rows": (
        configured(vocab_size=600),
        r"holds 'model.embed_tokens.weight' of shape \[512, 64\], the config asks for \[600, 64\]",
    ),
    "hidden size": (configured(hidden_size=128), r"the config asks for \[512, 128\]"),
    "query projection": (
        configured(head_dim=32),
        r"'model.layers.0.self_attn.k_proj.weight' of shape \[32, 64\]",
    ),
    "mlp": (configured(intermediate_size=100), r"of shape \[64, 96\], the config asks for \[64, 100\]"),
    "one matrix": (replaced(UP, torch.zeros(64, 96)), rf"holds '{UP}' of shape \[64, 96\]"),
    "more layers": (configured(num_hidden_layers=3), "has num_hidden_layers 3, but layer 2 is missing"),
    "integers": (
        reweighted(lambda tensors: tensors.update({name: t.to(torch.int8) for name, t in tensors.items()})),
        "weights must be floats of 16 bits or more, .* is I8",
    ),
}


@pytest.mark.parametrize(("damage", "message"), CONFIGS.values(), ids=CONFIGS.keys())
def test_bad_config_is_refused(folder: Path, damage: Damage, message: str) -> None:
    damage(folder)
    refused(inspect, folder, message)


@pytest.mark.parametrize(("damage", "message"), FILES.values(), ids=FILES.keys())
def test_bad_weight_file_is_refused(folder: Path, damage: Damage, message: str) -> None:
    damage(folder)
    refused(inspect, folder, message)


@pytest.mark.parametrize(("damage", "message"), SHAPES.values(), ids=SHAPES.keys())
def test_tensors_that_disagree_with_the_config_are_refused(
    folder: Path, damage: Damage, message: str
) -> None:
    damage(folder)
    refused(inspect, folder, message)


INDEX = "model.safetensors.index.json"


def sharded(change: Callable[[dict[str, str], Path], object]) -> Damage:
    """Split the weights into two shards with an index, then change the index or the shards."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        halves = {name: f"shard-{index % 2}.safetensors" for index, name in enumerate(sorted(tensors))}
        for shard in sorted(set(halves.values())):
            part = {name: tensors[name] for name in tensors if halves[name] == shard}
            save_file(part, folder / shard, metadata={"format": "pt"})
        change(halves, folder)
        if not (folder / INDEX).exists():
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": halves}))

    return damage


def _again(halves: dict[str, str], folder: Path) -> None:
    other = "shard-0.safetensors" if halves[UP] == "shard-1.safetensors" else "shard-1.safetensors"
    tensors = load_file(folder / other)
    save_file(tensors | {UP: torch.zeros(96, 64)}, folder / other, metadata={"format": "pt"})


def _linked_shard(_: dict[str, str], folder: Path) -> None:
    target = (folder / "shard-0.safetensors").rename(folder.parent / "shard-0.safetensors")
    (folder / "shard-0.safetensors").symlink_to(target)


def _pointed(place: str) -> Damage:
    def change(halves: dict[str, str], folder: Path) -> None:
        shutil.copy(folder / halves[UP], folder.parent / "outside.safetensors")
        halves[UP] = place

    return sharded(change)


SHARDS: dict[str, tuple[Damage, str]] = {
    "outside, relative": (_pointed("../outside.safetensors"), "files of its own folder: .* to '../outside.safet"),
    "outside, by a detour": (_pointed("toy/../../outside.safetensors"), "files of its own folder"),
    "outside, absolute": (_pointed("/etc/outside.safetensors"), "files of its own folder: .* to '/etc/outside"),
    "outside, backslashes": (_pointed("..\\outside.safetensors"), "files of its own folder"),
    "outside, a link": (sharded(_linked_shard), "weights must lie in the checkpoint's folder: .*shard-0"),
    "not safetensors": (_pointed("shard-0.bin"), "files of its own folder: .* to 'shard-0.bin'"),
    "not a name": (
        sharded(lambda halves, _: halves.update({UP: 3})),  # type: ignore[dict-item]
        "files of its own folder: .* to 3",
    ),
    "no such shard": (_pointed("shard-7.safetensors"), "shard is missing: .* sends 'model.* to 'shard-7.safetensors'"),
    "tensor not in its shard": (
        sharded(lambda halves, _: halves.update({"model.x.weight": "shard-0.safetensors"})),
        "shard lacks a tensor: .*shard-0.safetensors does not hold 'model.x.weight'",
    ),
    "tensor in two shards": (sharded(_again), f"shards must not share tensors: .*shard-1.* holds '{UP}' a second|"
                                              f"shard holds a tensor too many: .*shard-0.* has '{UP}'"),
    "tensor unknown to the index": (
        sharded(lambda halves, _: halves.pop(UP)),
        f"shard holds a tensor too many: .* has '{UP}', unknown to its index",
    ),
    "no weight_map": (
        sharded(lambda _, folder: (folder / INDEX).write_text("{}")),
        "shard index must map tensors to files: .* has no weight_map",
    ),
    "tensor named twice": (
        sharded(lambda _, folder: (folder / INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}')),
        "names 'a' twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), SHARDS.values(), ids=SHARDS.keys())
def test_bad_shards_are_refused(folder: Path, damage: Damage, message: str) -> None:
    damage(folder)
    refused(inspect, folder, message)


def test_good_shards_load_to_the_same_weights(folder: Path, toy_folder: Path) -> None:
    sharded(lambda *_: None)(folder)
    ours = load_checkpoint(CheckpointConfig(path=str(folder), device="cpu")).model.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in load_file(toy_folder / WEIGHTS).items())


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def blob(header: bytes | dict[str, Any], data: bytes = bytes(4)) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


HEADERS: dict[str, tuple[bytes, str]] = {
    "length beyond the file": (struct.pack("<Q", 99) + b"{}", "says its header has 99 bytes, but holds 10"),
    "length 2^63": (struct.pack("<Q", 2**63) + b"{}", "at most 25000000 are allowed"),
    "not UTF-8": (blob(b'{"\xff": 1}'), "is not UTF-8 at byte 2"),
    "not JSON": (blob(b"{,}"), "does not hold valid JSON"),
    "a list": (blob(b"[]"), "must hold a JSON object"),
    "name twice": (blob(b'{"a": 1, "a": 1}'), "names 'a' twice"),
    "entry a number": (blob({"a": 1}), "describes 'a' by int"),
    "unknown dtype": (blob({"a": entry("F13")}), "gives 'a' the dtype 'F13'"),
    "dtype a list": (blob({"a": entry(["F32"])}), "gives 'a' the dtype"),  # type: ignore[arg-type]
    "shape negative": (blob({"a": entry(shape=[-1])}), "shape .-1., which is not a list of sizes"),
    "shape of 2^62": (blob({"a": entry(shape=[2**62, 0], offsets=[0, 0])}), "not a list of sizes"),
    "shape of truths": (blob({"a": entry(shape=[True])}), "not a list of sizes"),
    "offsets not numbers": (blob({"a": entry(offsets=[float("nan"), 4])}), "which are not .begin, end."),
    "offsets reversed": (blob({"a": entry(offsets=[4, 0])}), "gives 'a' -4 bytes"),
    "offsets of three": (blob({"a": entry(offsets=[0, 2, 4])}), "which are not .begin, end."),
    "size and shape differ": (blob({"a": entry(shape=[2])}), "gives 'a' 4 bytes, but F32"),
    "overlap": (blob({"a": entry(), "b": entry()}), "'b' at byte .* where it overlaps another tensor"),
    "hole": (blob({"a": entry(offsets=[4, 8])}, bytes(8)), "where it leaves a hole before it"),
    "out of range": (blob({"a": entry(shape=[100], offsets=[0, 400])}), "it is truncated"),
    "a million tensors": (
        blob(b'{"a": "data_offsets"' + b',"data_offsets"' * 100_001),
        "more than 100000 tensors",
    ),
}


@pytest.mark.parametrize(("content", "message"), HEADERS.values(), ids=HEADERS.keys())
def test_bad_header_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    refused(read_header, path, message)


LOADED: dict[str, tuple[Damage, dict[str, Any], str]] = {
    "NaN": (
        poked(UP, float("nan")),
        {},
        f"weights must be finite: .* holds 1 NaN or Inf among the 6144 .* '{UP}'",
    ),
    "Inf": (
        poked(NORM, float("-inf")),
        {},
        f"holds 1 NaN or Inf among the 64 values of '{NORM}', loaded as float32",
    ),
    "fewer layers": (
        configured(num_hidden_layers=1),
        {},
        "weights that its model has no place for: .* has 'model.layers.1.input_layernorm.weight' \\(and 8 more",
    ),
    "no embedding": (
        replaced("model.embed_tokens.weight", None),
        {},
        "lacks weights of its model: .* has no 'model.embed_tokens.weight'",
    ),
    "too large for float16": (poked(UP, 1e30), {"dtype": "float16"}, f"of '{UP}', loaded as float16"),
    "a norm is missing": (replaced(NORM, None), {}, f"lacks weights of its model: .* has no '{NORM}'"),
    "a norm of another width": (
        replaced(NORM, torch.ones(32)),
        {},
        rf"holds '{NORM}' of shape \[32\], the model asks for \[64\]",
    ),
    "a tensor too many": (
        replaced("model.layers.0.extra.weight", torch.ones(3)),
        {},
        "weights that its model has no place for: .* has 'model.layers.0.extra.weight'",
    ),
    "another architecture's config": (configured(model_type="gpt_neox"), {}, "lacks weights of its model"),
    "tokenizer.json is garbage": (written("tokenizer.json", b"garbage"), {}, "cannot be loaded: .*toy: "),
    "dtype of the config unknown": (configured(hidden_act="no_such"), {}, "cannot be loaded: .*no_such"),
}


@pytest.mark.parametrize(("damage", "options", "message"), LOADED.values(), ids=LOADED.keys())
def test_what_only_loading_can_tell_is_refused_then(
    folder: Path, capfd: pytest.CaptureFixture[str], damage: Damage, options: dict[str, Any], message: str
) -> None:
    damage(folder)
    refused(load, folder, message, **options)
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


def test_one_file_is_not_a_checkpoint(folder: Path) -> None:
    refused(
        inspect, folder / WEIGHTS, "must be a folder or a .gguf file: .* is neither. Name its folder instead"
    )
    refused(inspect, folder / "config.json", "must be a folder or a .gguf file: .* is neither.$")
    pickled(folder)
    refused(inspect, folder / "pytorch_model.bin", "is a pickle, which can run code when it is read")


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.ckpt"])
def test_a_folder_of_pickles_says_what_it_holds(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    refused(inspect, tmp_path, "has no config.json, and its weights are pickles")


def test_a_pickle_is_converted_by_the_line_of_its_refusal(folder: Path) -> None:
    pickled(folder)
    with pytest.raises(CheckpointError) as caught:
        inspect(folder)
    line = re.search(r"convert it: (python -c .*)", str(caught.value))
    assert line is not None
    exec(shlex.split(line[1])[2], {})
    ours = load_checkpoint(CheckpointConfig(path=f"{folder}-safetensors", device="cpu"))
    assert torch.equal(ours.model.state_dict()[UP], torch.load(folder / "pytorch_model.bin")[UP])


def test_a_folder_with_a_gguf_file_says_to_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "toy.gguf").write_bytes(b"")
    refused(inspect, tmp_path, r"to use its GGUF file, name the file: .*toy\.gguf")
