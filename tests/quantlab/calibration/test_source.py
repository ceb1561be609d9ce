"""A streamed model is the model in memory: same statistics, no weight left behind, one shard mapped at a time."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantlab.calibration.source as sources
from quantlab.calibration.collect import calibrate
from quantlab.calibration.source import must_stream, open_lent
from quantlab.calibration.stream import walk_blocks
from quantlab.config import CheckpointConfig
from quantlab.errors import CalibrationError
from quantlab.inspection.checkpoint import inspect_checkpoint
from quantlab.models.loading import load_checkpoint
from tests import toys


def _ids(num_sequences: int = 4, length: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, toys.NUM_TOKENS, (num_sequences, length), generator=generator)


def _sharded(family: str, folder: Path, **changes: Any) -> CheckpointConfig:
    """A toy checkpoint in several shards."""
    toys.toy_model(family, **changes).save_pretrained(folder, max_shard_size="60KB")
    toys.toy_tokenizer().save_pretrained(folder)
    return CheckpointConfig(path=str(folder), device="cpu")


FAMILIES = [
    "llama",
    "gemma2",
    "gemma3_text",
    "qwen3",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "bloom",
    "diffllama",
    "quantlab",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_statistics_are_those_of_the_model_in_memory(family: str, tmp_path: Path) -> None:
    config, ids_NT = _sharded(family, tmp_path / "toy"), _ids()
    lent = open_lent(config, inspect_checkpoint(config))
    streamed = calibrate(lent.model, ids_NT, batch_size=3, source=lent.source)
    held = calibrate(load_checkpoint(config).model, ids_NT, batch_size=3)
    assert streamed.linears.keys() == held.linears.keys()
    for name, stats in held.linears.items():
        assert torch.equal(streamed.linears[name].gram_II, stats.gram_II), name
        assert torch.equal(streamed.linears[name].mean_I, stats.mean_I), name
    assert streamed.attention.keys() == held.attention.keys()
    assert all(parameter.is_meta for parameter in lent.model.parameters())


def test_only_the_layer_at_hand_has_weights(tmp_path: Path) -> None:
    config = _sharded("llama", tmp_path / "toy")
    lent = open_lent(config, inspect_checkpoint(config))
    for step in walk_blocks(lent.model, _ids(), source=lent.source):
        real = {name for name, each in lent.model.named_parameters() if not each.is_meta}
        assert real == {f"{step.name}.{name}" for name, _ in step.layer.named_parameters()}


def test_what_is_put_in_the_place_of_a_weight_stays(tmp_path: Path) -> None:
    """A layer that is quantized in the loop keeps its new weights."""
    config = _sharded("llama", tmp_path / "toy")
    lent = open_lent(config, inspect_checkpoint(config))
    layer = lent.source.layers[0]
    own = torch.nn.Parameter(torch.ones(96, 64), requires_grad=False)
    with lent.source.layer("model.layers.0", layer):
        layer.get_submodule("mlp.up_proj").weight = own
    assert layer.get_parameter("mlp.up_proj.weight") is own
    assert [name for name, each in layer.named_parameters() if not each.is_meta] == ["mlp.up_proj.weight"]


def test_one_shard_is_mapped_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _sharded("llama", tmp_path / "toy")
    assert len(list((tmp_path / "toy").glob("*.safetensors"))) > 3
    plain, counts = sources.safe_open, [0, 0]

    class Counting:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = plain(*args, **kwargs)

        def __enter__(self) -> Any:
            counts[0] += 1
            counts[1] = max(counts)
            assert _mapped(tmp_path) <= 1
            return self.file.__enter__()

        def __exit__(self, *end: Any) -> Any:
            counts[0] -= 1
            return self.file.__exit__(*end)

    monkeypatch.setattr(sources, "safe_open", Counting)
    lent = open_lent(config, inspect_checkpoint(config))
    for _ in walk_blocks(lent.model, _ids(), source=lent.source):
        assert _mapped(tmp_path) == 0
    assert counts == [0, 1]


def test_a_shard_is_mapped_anew_after_some_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that were read stay in memory as long as their file is mapped."""
    toys.toy_model().save_pretrained(tmp_path)
    toys.toy_tokenizer().save_pretrained(tmp_path)
    config = CheckpointConfig(path=str(tmp_path), device="cpu")
    source = open_lent(config, inspect_checkpoint(config)).source
    names = [f"model.layers.0.{name}" for name in source.layers[0].state_dict()]
    assert len(source._portions(names)) == 1
    # up_proj, gate_proj, down_proj: 96 x 64 x 4 bytes each, others are smaller
    monkeypatch.setattr(sources, "_MAPPED", 96 * 64 * 4)
    portions = source._portions(names)
    sizes = [sum(_num_bytes(source, own) for _, own in held) for _, held in portions]
    assert max(sizes) == 96 * 64 * 4 and all(a + b > 96 * 64 * 4 for a, b in pairwise(sizes))
    assert sorted(name for _, held in portions for name, _ in held) == sorted(names)


def _num_bytes(source: sources.FolderSource, name: str) -> int:
    stored = source.places[name]
    assert stored is not None
    return stored[1].end - stored[1].begin


def _mapped(folder: Path) -> int:
    """Files of the folder that this process maps."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split()[-1] for line in lines if str(folder) in line})


def test_a_checkpoint_of_the_base_model_is_found_without_its_prefix(tmp_path: Path) -> None:
    config = _sharded("gpt2", tmp_path / "toy")
    for file in (tmp_path / "toy").glob("*.safetensors"):
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    index = tmp_path / "toy" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"transformer.', '"'))
    lent = open_lent(config, inspect_checkpoint(config))
    assert calibrate(lent.model, _ids(), source=lent.source).linears


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    config, name = _sharded("llama", tmp_path / "toy"), "model.layers.1.mlp.down_proj.weight"
    for file in (tmp_path / "toy").glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name][0, 0] = float("nan")
            save_file(tensors, file, metadata={"format": "pt"})
    lent = open_lent(config, inspect_checkpoint(config))
    with pytest.raises(CalibrationError, match=r"weights must be finite.*layers\.1\.mlp\.down_proj\.weight"):
        calibrate(lent.model, _ids(), source=lent.source)


def test_tensors_under_other_names_are_refused(tmp_path: Path) -> None:
    config = _sharded("llama", tmp_path / "toy")
    lent = open_lent(config, inspect_checkpoint(config))
    lent.source.places["model.layers.0.mlp.up_proj.weight"] = None
    with pytest.raises(
        CalibrationError, match=r"has no 'model\.layers\.0\.mlp\.up_proj\.weight'. Leave --stream out"
    ):
        next(walk_blocks(lent.model, _ids(), source=lent.source))


def test_packed_weights_are_refused(tmp_path: Path) -> None:
    config = _sharded("llama", tmp_path / "toy")
    info = inspect_checkpoint(config)
    body = tmp_path / "toy" / "config.json"
    body.write_text(body.read_text().replace("{", '{"quantization_config": {"quant_method": "fp8"},', 1))
    with pytest.raises(CalibrationError, match="only plain weights can be streamed"):
        open_lent(config, info)


def test_what_does_not_fit_is_streamed(toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CheckpointConfig(path=str(toy_folder), device="cpu")
    info = inspect_checkpoint(config)
    assert not must_stream(config, info) and must_stream(config, info, asked=True)
    monkeypatch.setattr(sources, "_free_memory", lambda: info.num_parameters * 4)
    assert must_stream(config, info) and not must_stream(config, info, asked=False)


def test_a_gguf_file_cannot_be_streamed(toy_folder: Path) -> None:
    config = CheckpointConfig(path=str(toy_folder), device="cpu")
    info = replace(inspect_checkpoint(config), kind="gguf", num_parameters=10**15)
    assert not must_stream(config, info)
    with pytest.raises(CalibrationError, match="only safetensors can be streamed"):
        must_stream(config, info, asked=True)
