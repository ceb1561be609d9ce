"""The folder: complete, in shards of the size asked for, and of what the model holds exactly."""

import hashlib
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from quantlab.calibration.calibrator import Calibrator
from quantlab.errors import CheckpointError, SchemeError
from quantlab.export import folder as folder_module
from quantlab.export import shards
from quantlab.export.folder import export_checkpoint
from quantlab.export.tensors import stored_dtype
from quantlab.models.loading import Checkpoint
from quantlab.schemes import Scheme
from tests.quantlab.export.exports import export, loaded, tensors_of
from tests.toys import save_checkpoint, toy_model, toy_tokenizer


@pytest.fixture(scope="module")
def toy(toy_folder: Path) -> Checkpoint:
    return loaded(toy_folder)


def test_a_folder_holds_everything_and_its_manifest_is_true(toy: Checkpoint, tmp_path: Path) -> None:
    summary = export(toy, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"} < names
    assert {"README.md", "recipe.json", "MANIFEST.json"} < names
    files = json.loads((tmp_path / "out/MANIFEST.json").read_text())["files"]
    assert set(files) == names - {"MANIFEST.json"}
    for name, entry in files.items():
        content = (tmp_path / "out" / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert summary.weights_bytes == (tmp_path / "out/model.safetensors").stat().st_size
    # 4-bit codes, a float32 scale per 32 of them, and two int64 of shape: 14 linears of 7 shapes in 2 layers.
    num_weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    assert summary.average_storage_bits == pytest.approx(4 + 32 / 32 + 14 * 128 / num_weights)
    assert len(summary.swapped) == 14
    assert json.loads(json.dumps(summary.summary()))["path"] == str(tmp_path / "out")


def test_the_same_export_is_the_same_bytes(toy: Checkpoint, tmp_path: Path) -> None:
    export(toy, tmp_path / "a")
    export(toy, tmp_path / "b")
    assert (tmp_path / "a/MANIFEST.json").read_bytes() == (tmp_path / "b/MANIFEST.json").read_bytes()


def test_shards_hold_at_most_their_size_and_the_index_finds_everything(
    toy: Checkpoint, tmp_path: Path
) -> None:
    export(toy, tmp_path / "whole")
    summary = export(toy, tmp_path / "shards", max_shard_size=10_000)
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
    assert len(files) > 4
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert summary.weights_bytes == sum(path.stat().st_size for path in files)
    for path in files:
        with safe_open(path, "pt") as file:
            sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118
            assert all(index["weight_map"][name] == path.name for name in file.keys())  # noqa: SIM118
        assert sum(sizes) <= 10_000 or len(sizes) == 1
    whole, sharded = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "shards")
    assert set(index["weight_map"]) == set(whole) == set(sharded)
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())


def test_one_shard_at_a_time_is_in_memory(
    toy: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[weakref.ref[torch.Tensor]] = []

    def save_file(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        alive = [reference for reference in written if reference() is not None]
        assert not alive, f"{len(alive)} tensors of earlier shards are still held"
        written.extend(weakref.ref(tensor) for tensor in tensors.values())
        path.touch()

    monkeypatch.setattr(shards, "save_file", save_file)
    export(toy, tmp_path / "out", max_shard_size=10_000)
    assert len(written) == 3 * 14 + 7


def test_progress_counts_every_linear_once(toy: Checkpoint, tmp_path: Path) -> None:
    seen: list[int] = []
    export(toy, tmp_path / "out", skip=["*.down_proj"], advance=seen.append)
    assert sum(seen) == 12


def test_skipped_linears_keep_their_values_and_are_ignored_by_name(toy: Checkpoint, tmp_path: Path) -> None:
    summary = export(toy, tmp_path / "out", skip=["*.layers.0.*", "*.down_proj", "lm_head"])
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert set(config["ignore"]) == {*summary.skipped, "lm_head"}
    assert len(summary.skipped) == 8
    tensors = tensors_of(tmp_path / "out")
    for name in config["ignore"]:
        assert torch.equal(tensors[f"{name}.weight"], toy.model.get_submodule(name).weight)
    recipe = json.loads((tmp_path / "out/recipe.json").read_text())
    assert recipe["quantize"]["skip"] == ["*.layers.0.*", "*.down_proj", "lm_head"]


def test_nothing_to_quantize_is_an_error(toy: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="the 14 of LlamaForCausalLM are all skipped"):
        export(toy, tmp_path / "out", skip=["*"])
    with pytest.raises(SchemeError, match=r"'\*\.downproj' matches none\. Did you mean '\*\.down_proj'"):
        export(toy, tmp_path / "out", skip=["*.downproj"])
    with pytest.raises(SchemeError, match=r"'zzz' matches none\. There are \*\.q_proj, \*\.k_proj"):
        export(toy, tmp_path / "out", skip=["zzz"])


def test_linears_that_share_weights_are_refused(tmp_path: Path) -> None:
    checkpoint = loaded(save_checkpoint("llama", tmp_path / "in"))
    first, second = (layer.self_attn for layer in checkpoint.model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    with pytest.raises(SchemeError, match=r"1\.self_attn\.q_proj shares that of model\.layers\.0"):
        export(checkpoint, tmp_path / "out")
    with pytest.raises(SchemeError, match=r"1\.self_attn\.q_proj and model\S+ are one matrix"):
        export(checkpoint, tmp_path / "out", skip=["*.0.self_attn.q_proj"])
    assert not list(tmp_path.glob("*out*"))


def test_experts_in_one_parameter_are_refused_or_skipped(tmp_path: Path) -> None:
    checkpoint = loaded(save_checkpoint("llama", tmp_path / "in"))
    mlp = checkpoint.model.model.layers[0].mlp
    mlp.experts = torch.nn.Parameter(torch.zeros(2, 64, 64))
    with pytest.raises(SchemeError, match=r"no nn\.Linear, .*mlp\.experts is \[2, 64, 64\]"):
        export(checkpoint, tmp_path / "out")
    export(checkpoint, tmp_path / "out", skip=["*.experts"])
    assert tensors_of(tmp_path / "out")["model.layers.0.mlp.experts"].shape == (2, 64, 64)


def test_a_low_bit_source_is_labelled_and_gets_the_same_codes_back(toy: Checkpoint, tmp_path: Path) -> None:
    export(toy, tmp_path / "first", "w8")
    export(loaded(tmp_path / "first"), tmp_path / "second", "w8")
    first, second = tensors_of(tmp_path / "first"), tensors_of(tmp_path / "second")
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first if name.endswith("_packed"))
    assert "already quantized (dequantized w8)" in (tmp_path / "second/README.md").read_text()


def test_a_group_that_does_not_divide_names_the_linear(toy: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match=r"mlp\.down_proj has in_features=96, group_size=64"):
        export(toy, tmp_path / "out", "w4g64")
    assert not list(tmp_path.iterdir())


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    checkpoint = loaded(save_checkpoint("llama", tmp_path / "in", tie_word_embeddings=True))
    export(checkpoint, tmp_path / "out")
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    assert "tied to the embeddings" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "Conv1D"), ("falcon", "FalconLinear")])
def test_linears_that_readers_do_not_load_are_refused(tmp_path: Path, family: str, kind: str) -> None:
    checkpoint = loaded(save_checkpoint(family, tmp_path / "in"))
    with pytest.raises(SchemeError, match=rf"holds nn\.Linear only: transformer\.h\.0\.\S+ is a {kind}"):
        export(checkpoint, tmp_path / "out")


def test_a_bfloat16_source_is_stored_in_bfloat16(tmp_path: Path) -> None:
    model = toy_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "in")
    toy_tokenizer().save_pretrained(tmp_path / "in")
    checkpoint = loaded(tmp_path / "in", dtype="float32")
    assert next(checkpoint.model.parameters()).dtype == torch.float32
    summary = export(checkpoint, tmp_path / "out")
    assert summary.stored_dtype == "bfloat16"
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    floats = {tensor.dtype for tensor in tensors_of(tmp_path / "out").values() if tensor.is_floating_point()}
    assert floats == {torch.bfloat16}


def test_the_stored_dtype_never_loses_a_value() -> None:
    model = toy_model("llama")
    assert stored_dtype(model, "bfloat16") == torch.float32
    assert stored_dtype(model.to(torch.bfloat16), "float32") == torch.bfloat16
    assert stored_dtype(model.to(torch.float32), "bfloat16") == torch.bfloat16
    assert stored_dtype(model, "dequantized Q4_1") == torch.float32


def test_an_architecture_that_is_converted_while_loading_is_refused(
    toy: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.core_model_loading import Chunk, WeightConverter

    converter = WeightConverter(["gate_up"], ["gate", "up"], operations=[Chunk(dim=0)])
    monkeypatch.setattr(toy.model, "_weight_conversions", [converter])
    with pytest.raises(CheckpointError, match="LlamaForCausalLM merges or splits them"):
        export(toy, tmp_path / "out")


def test_an_architecture_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    checkpoint = loaded(save_checkpoint("llama", tmp_path / "in"))
    checkpoint.model.config.auto_map = {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM brings its own \(auto_map\)"):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_of_a_wider_dtype_are_not_rounded(tmp_path: Path) -> None:
    """Parameters in float32 among those in bfloat16: only what bfloat16 holds exactly is written in it."""
    model = toy_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "in")
    toy_tokenizer().save_pretrained(tmp_path / "in")
    checkpoint = loaded(tmp_path / "in", dtype="bfloat16")
    layers = checkpoint.model.model.layers
    fine = torch.randn(64, generator=torch.Generator().manual_seed(0))
    layers[0].input_layernorm.weight = torch.nn.Parameter(fine)
    layers[1].input_layernorm.weight = torch.nn.Parameter(torch.full((64,), 0.5))
    export(checkpoint, tmp_path / "out")
    tensors = tensors_of(tmp_path / "out")
    assert torch.equal(tensors["model.layers.0.input_layernorm.weight"], fine)
    assert tensors["model.layers.1.input_layernorm.weight"].dtype == torch.bfloat16
    assert tensors["model.norm.weight"].dtype == torch.bfloat16
    card = (tmp_path / "out/README.md").read_text()
    assert "kept in their own dtype, which holds more: `model.layers.0.input_layernorm.weight`" in card


def test_scales_of_the_cache_are_no_tensors_that_were_kept(tmp_path: Path) -> None:
    toy_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "in")
    toy_tokenizer().save_pretrained(tmp_path / "in")
    checkpoint = loaded(tmp_path / "in", dtype="bfloat16")
    ids = torch.arange(64).reshape(4, 16)
    export(checkpoint, tmp_path / "out", "w8kv8ts", calibrator=Calibrator(ids))
    assert tensors_of(tmp_path / "out")["model.layers.0.self_attn.k_scale"].dtype == torch.float32
    assert "which holds more" not in (tmp_path / "out/README.md").read_text()


def test_what_gguf_cannot_hold_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("transforms were reached")

    monkeypatch.setattr(folder_module, "prepared", never)
    scaled = loaded(save_checkpoint("llama", tmp_path / "scaled"))
    scaled.model.config.hidden_act = "gelu"
    other = loaded(save_checkpoint("llama", tmp_path / "other"))
    other.model.model.extra = torch.nn.Linear(2, 2)
    for checkpoint, message in ((scaled, "the activation silu"), (other, "has 'model.extra.weight'")):
        with pytest.raises(SchemeError, match=message):
            export_checkpoint(checkpoint, Scheme.parse("q8_0"), "gguf", tmp_path / "out")
    fits = loaded(save_checkpoint("llama", tmp_path / "fits"))
    with pytest.raises(AssertionError, match="transforms were reached"):
        export_checkpoint(fits, Scheme.parse("q8_0"), "gguf", tmp_path / "out")


def test_the_card_of_a_gguf_file_names_the_types_in_it(toy: Checkpoint, tmp_path: Path) -> None:
    export_checkpoint(toy, Scheme.parse("q8_0"), "gguf", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "| scales | float16 |" in card and "| kept in F32 |" in card


def test_a_gguf_file_of_linears_that_share_weights_is_refused(tmp_path: Path) -> None:
    checkpoint = loaded(save_checkpoint("llama", tmp_path / "in"))
    first, second = (layer.self_attn for layer in checkpoint.model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    with pytest.raises(SchemeError, match=r"format gguf needs a weight of its own"):
        export_checkpoint(checkpoint, Scheme.parse("q8_0"), "gguf", tmp_path / "out")
