"""What a loaded checkpoint is: the model transformers loads, complete, quiet, and ready to be evaluated."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from quantlab.config import CheckpointConfig
from quantlab.errors import CheckpointError, ConfigError
from quantlab.inspection.checkpoint import inspect_checkpoint
from quantlab.models.loading import Checkpoint, load_checkpoint, resolve_device, resolve_dtype
from tests.toys import FAMILIES, NUM_TOKENS, save_checkpoint, toy_model, toy_tokenizer

_SMALL = {"vocab_size": NUM_TOKENS, "bos_token_id": 0, "eos_token_id": 0}
_SMALL_GPT = _SMALL | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
_SMALL_HF = _SMALL | {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}

UNLISTED: dict[str, dict[str, Any]] = {
    "mamba": _SMALL_HF | {"state_size": 4},
    "rwkv": _SMALL_HF | {"attention_hidden_size": 64},
    "openai-gpt": _SMALL_GPT,
    "ctrl": _SMALL_GPT | {"dff": 96},
    "xlm": _SMALL | {"emb_dim": 64, "n_layers": 2, "n_heads": 4},
    "xlnet": _SMALL | {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96},
    "granitemoehybrid": _SMALL_HF
    | {"num_local_experts": 0, "layer_types": ["attention"] * 2, "shared_intermediate_size": 96},
}
"""Architectures that quantlab has no data of, which name or shape things in their own ways."""


def loaded(path: Path, **options: Any) -> Checkpoint:
    return load_checkpoint(CheckpointConfig(path=str(path), device="cpu", **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_the_one_that_was_saved(tmp_path: Path, family: str) -> None:
    checkpoint = loaded(save_checkpoint(family, tmp_path / family))
    model = toy_model(family)
    assert type(checkpoint.model) is type(model)
    ours, theirs = checkpoint.model.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def saved(folder: Path, model_type: str, **sizes: Any) -> PreTrainedModel:
    """Write a toy checkpoint of any architecture; returns its model."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("model_type", UNLISTED)
def test_an_architecture_that_is_not_listed_is_loaded(tmp_path: Path, model_type: str) -> None:
    model = saved(tmp_path, model_type, **UNLISTED[model_type])
    checkpoint = loaded(tmp_path)
    assert type(checkpoint.model) is type(model)
    ours, theirs = checkpoint.model.state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert checkpoint.info.vocab_size == model.get_input_embeddings().weight.shape[0]


def test_a_vocabulary_that_no_name_tells_is_the_loaded_embeddings(tmp_path: Path) -> None:
    saved(tmp_path, "xlnet", **UNLISTED["xlnet"])
    config = json.loads((tmp_path / "config.json").read_text())
    # XLNet's older spelling: inspection finds the size neither here nor among the tensors.
    config["n_token"] = config.pop("vocab_size")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert inspect_checkpoint(CheckpointConfig(path=str(tmp_path))).vocab_size == 0
    assert loaded(tmp_path).info.vocab_size == NUM_TOKENS


def test_a_layer_for_predicting_further_tokens_is_left_out(tmp_path: Path) -> None:
    """DeepSeek-V3 is stored with such a layer, number 61 after its 61; transformers knows and drops it."""
    sizes = _SMALL_HF | {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    }
    model = saved(tmp_path, "deepseek_v3", **sizes)
    plain = inspect_checkpoint(CheckpointConfig(path=str(tmp_path)))
    tensors = load_file(tmp_path / "model.safetensors")
    extra = {"embed_tokens": (NUM_TOKENS, 64), "eh_proj": (64, 128), "mlp.up_proj": (33, 65)}
    tensors |= {f"model.layers.61.{name}.weight": torch.ones(shape) for name, shape in extra.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = loaded(tmp_path)
    assert checkpoint.info.linears == plain.linears
    ours = checkpoint.model.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in model.state_dict().items())


def test_the_model_is_ready_to_be_evaluated(toy_folder: Path) -> None:
    checkpoint = loaded(toy_folder)
    assert not checkpoint.model.training
    assert not any(parameter.requires_grad for parameter in checkpoint.model.parameters())
    assert checkpoint.model.config._attn_implementation == "sdpa"
    assert checkpoint.model.dtype == torch.float32
    assert checkpoint.family.packable
    text = "A text = of 12 words, \n\n with é."
    assert checkpoint.tokenizer.encode(text) == toy_tokenizer().encode(text)
    assert checkpoint.model.generation_config is not None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_once_to_the_asked_dtype(toy_folder: Path, dtype: str) -> None:
    model = loaded(toy_folder, dtype=dtype).model
    expected = toy_model().to(getattr(torch, dtype)).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_known_info_is_not_inspected_again(toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CheckpointConfig(path=str(toy_folder), device="cpu")
    info = inspect_checkpoint(config)
    monkeypatch.setattr(
        "quantlab.models.loading.inspect_checkpoint", lambda _: pytest.fail("inspected again")
    )
    assert load_checkpoint(config, info).info is info


@pytest.fixture
def talkative() -> Iterator[tuple[int, bool]]:
    """transformers tells everything for the span of a test: (verbosity, progress bars)."""
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    yield logging.WARNING, True
    logging.set_verbosity(before)


def test_loading_prints_nothing_and_leaves_logging_as_it_was(
    toy_folder: Path, talkative: tuple[int, bool], capfd: pytest.CaptureFixture[str]
) -> None:
    loaded(toy_folder)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == talkative


def test_loading_leaves_the_global_random_state_alone(toy_folder: Path) -> None:
    before = torch.get_rng_state()
    loaded(toy_folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_logging_is_restored_after_a_failure(
    toy_folder: Path, tmp_path: Path, talkative: tuple[int, bool]
) -> None:
    folder = Path(shutil.copytree(toy_folder, tmp_path / "toy"))
    (folder / "tokenizer.json").write_text("garbage")
    with pytest.raises(CheckpointError):
        loaded(folder)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == talkative


def test_a_config_cannot_choose_the_attention(toy_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy_folder, tmp_path / "toy"))
    config = json.loads((folder / "config.json").read_text())
    for key in ("_attn_implementation", "attn_implementation"):
        (folder / "config.json").write_text(json.dumps(config | {key: "someone/some-kernel"}))
        assert loaded(folder).model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("stored", ["once", "twice"])
def test_a_tied_head_is_the_embedding(tmp_path: Path, stored: str) -> None:
    folder = save_checkpoint("llama", tmp_path / "tied", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    if stored == "twice":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = loaded(folder).model
    assert torch.equal(model.get_output_embeddings().weight, tensors["model.embed_tokens.weight"])


def test_a_stored_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint("llama", tmp_path / "tied", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"must be stored once, or twice and equal: .* tie_word_embeddings"
    ):
        loaded(folder)


def compress(folder: Path) -> dict[str, torch.Tensor]:
    """Make the matrices of a toy folder 8-bit compressed-tensors, one scale a row; returns what they amount to."""
    tensors, dense = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight_OI = tensors[name]
        scale_O1 = weight_OI.abs().amax(1, keepdim=True) / 127
        tensors[name] = (weight_OI / scale_O1).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale_O1
        dense[name] = tensors[name] * scale_O1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return dense


def test_compressed_tensors_weights_become_plain_linears_and_are_labelled(
    toy_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(toy_folder, tmp_path / "toy"))
    dense = compress(folder)
    checkpoint = loaded(folder)
    assert (checkpoint.info.source_precision, checkpoint.info.source_scheme) == ("dequantized w8", "w8")
    assert checkpoint.info.linears == inspect_checkpoint(CheckpointConfig(path=str(toy_folder))).linears
    weights = dict(checkpoint.model.named_parameters())
    assert weights.keys() == dict(toy_model().named_parameters()).keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in dense.items())
    assert capfd.readouterr() == ("", "")


def test_trusted_code_of_a_checkpoint_is_run_and_untrusted_is_not(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    folder = Path(shutil.copytree(toy_folder, tmp_path / "own_code"))
    code = (
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    (folder / "modeling_own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "own_llama",
        "auto_map": {
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        loaded(folder)
    checkpoint = loaded(folder, trust_remote_code=True)
    assert type(checkpoint.model).__name__ == "OwnForCausalLM"
    expected = toy_model().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in checkpoint.model.state_dict().items())
    assert not checkpoint.family.packable


def test_devices_and_dtypes() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16


@pytest.mark.parametrize(("name", "num_devices"), [("cuda", 0), ("cuda:1", 1)])
def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, num_devices: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_devices)
    with pytest.raises(ConfigError, match=f"device '{name}' must exist: .* {num_devices} CUDA devices"):
        load_checkpoint(CheckpointConfig(path="never/looked-at", device=name))


@pytest.mark.gpu
def test_a_checkpoint_loads_to_cuda_in_bfloat16(toy_folder: Path) -> None:
    model = load_checkpoint(CheckpointConfig(path=str(toy_folder), device="cuda")).model
    assert (model.device.type, model.dtype) == ("cuda", torch.bfloat16)
    expected = AutoModelForCausalLM.from_pretrained(toy_folder, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(tensor.cpu(), expected[name]) for name, tensor in model.state_dict().items())
