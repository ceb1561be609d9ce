"""The compressed-tensors layout, and what plain transformers makes of it in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from quantlab.calibration.calibrator import Calibrator
from quantlab.config import CheckpointConfig, QuantizeConfig
from quantlab.errors import SchemeError
from quantlab.export.architecture import known_to_engines
from quantlab.export.compressed_tensors import pack_rows
from quantlab.export.folder import export_checkpoint
from quantlab.methods.rtn import quantize_weight
from quantlab.models.loading import Checkpoint, load_checkpoint
from quantlab.quantize import quantized
from quantlab.schemes import Scheme
from tests.toys import toy_model, toy_tokenizer

SCHEMES = ["w2g32", "w3g32", "w4", "w4g32", "w5", "w6g32", "w7g16", "w8"]
FAMILIES = ["qwen2", "qwen3", "gemma2", "phi3", "diffllama", "gpt_neox", "opt"]

METHODS = ["w4g32-gptq", "w4g32-awq", "w4g32-smooth", "w3g32-wclip", "fp8"]
"""What is not plain rounding."""
TWINS = {"standard": "LlamaForCausalLM", "diff_v1": "DiffLlamaForCausalLM"}
"""Variants of ours that transformers has, and as what."""

NUM_DOCUMENTS, CONTEXT = 12, 12

READER = """
import sys
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
ids = torch.from_numpy(np.load(sys.argv[1]))
for folder in sys.argv[2:]:
    AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        np.save(folder + ".npy", model(ids).logits.float().numpy())
"""
"""All that a user of the folder needs: no quantlab in it."""


def loaded(folder: Path, dtype: str = "auto") -> Checkpoint:
    return load_checkpoint(CheckpointConfig(path=str(folder), device="cpu", dtype=dtype))


def save(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A toy checkpoint whose logits differ enough between tokens to be predictions."""
    toy_model(family, gain=6.0).to(dtype).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def save_ours(variant: str, folder: Path) -> Path:
    """A toy model of one of our variants; gains of its heads' norms are not 1."""
    model = toy_model("quantlab", variant=variant, gain=6.0, rms_norm_eps=1e-5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("subln.weight"):
                parameter.mul_(torch.linspace(0.5, 2.0, len(parameter)))
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def calibrator() -> Calibrator:
    return Calibrator(torch.randint(1, 512, (4, 48), generator=torch.Generator().manual_seed(3)))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """Documents as HellaSwag has them: four rows each, one context and four endings."""
    generator = torch.Generator().manual_seed(0)
    contexts = torch.randint(1, 512, (NUM_DOCUMENTS, 1, CONTEXT), generator=generator).expand(-1, 4, -1)
    endings = torch.randint(1, 512, (NUM_DOCUMENTS, 4, 12), generator=generator)
    return torch.cat([contexts, endings], -1).flatten(0, 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, ids: Tensor) -> Path:
    """Every export of this file, `NAME`, and plain transformers' logits, `NAME.npy`; a family's source is `NAME-in`."""
    root = tmp_path_factory.mktemp("exports")
    np.save(root / "ids.npy", ids.numpy())
    save("llama", root / "llama")
    save("llama", root / "llama-bfloat16", torch.bfloat16)
    jobs = {name: ("llama", name) for name in [*SCHEMES, *METHODS, "w8kv8ts", "w8a8"]}
    jobs |= {f"ours-{variant}": (save_ours(variant, root / variant).name, "w4g32") for variant in TWINS}
    jobs |= {f"bfloat16-{name}": ("llama-bfloat16", name) for name in ("w4g32", "w8a8")}
    jobs |= {family: (save(family, root / f"{family}-in").name, "w4g32") for family in FAMILIES}
    checkpoints = {source: loaded(root / source) for source, _ in jobs.values()}
    for name, (source, scheme) in jobs.items():
        parsed = Scheme.parse(scheme)
        text = calibrator() if parsed.needs else None
        export_checkpoint(checkpoints[source], parsed, "compressed-tensors", root / name, calibrator=text)
    command = [sys.executable, "-c", READER, str(root / "ids.npy"), *(str(root / name) for name in jobs)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return root


def ours(checkpoint: Checkpoint, scheme: str, ids: Tensor) -> Tensor:
    """Logits of our own simulated model."""
    parsed, text = Scheme.parse(scheme), calibrator() if Scheme.parse(scheme).needs else None
    config = QuantizeConfig(kernel="simulated")
    with torch.no_grad(), quantized(checkpoint.model, parsed, config, calibrator=text):
        logits: Tensor = checkpoint.model(ids).logits
    return logits.float()


def choices(logits: Tensor, ids: Tensor) -> Tensor:
    """Of each document, the ending that the model finds most likely [NUM_DOCUMENTS]."""
    scores = logits[:, CONTEXT - 1 : -1].log_softmax(-1).gather(-1, ids[:, CONTEXT:, None]).sum((1, 2))
    return scores.view(NUM_DOCUMENTS, 4).argmax(-1)


@contextmanager
def dequantized(
    model: nn.Module, scheme: str, dtype: torch.dtype, inputs: Callable[[Tensor], Tensor] | None = None
) -> Iterator[None]:
    """What the layout promises: weight = code * scale in the scale's dtype; `inputs` changes the linears' inputs."""
    spec = Scheme.parse(scheme).weights
    assert spec is not None
    with ExitStack() as hooks:
        for name, linear in model.named_modules():
            if not isinstance(linear, nn.Linear) or name == "lm_head":
                continue
            chosen = quantize_weight(linear.weight, spec, scale_dtype=dtype)
            groups = chosen.codes.to(dtype).unflatten(-1, (chosen.scale.shape[-1], -1))
            linear.weight.data = (groups * chosen.scale.to(dtype).unsqueeze(-1)).flatten(-2)
            if inputs is not None:
                hook = linear.register_forward_pre_hook(lambda _, args: (inputs(args[0]),))
                hooks.callback(hook.remove)
        yield


def reader_grid(x: Tensor) -> Tensor:
    """Inputs as compressed-tensors' own simulation rounds them, one scale a token, in the dtype of x."""
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / scale).clamp(-128, 127).round() * scale


def read(folders: Path, name: str) -> Tensor:
    return torch.from_numpy(np.load(folders / f"{name}.npy"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_reads_our_model_bit_for_bit(folders: Path, ids: Tensor, scheme: str) -> None:
    expected = ours(loaded(folders / "llama"), scheme, ids)
    found = read(folders, scheme)
    assert len(choices(expected, ids).unique()) > 1
    assert torch.equal(choices(found, ids), choices(expected, ids))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_linears_is_read(folders: Path, ids: Tensor, family: str) -> None:
    expected = ours(loaded(folders / f"{family}-in"), "w4g32", ids)
    found = read(folders, family)
    assert torch.equal(choices(found, ids), choices(expected, ids))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("scheme", METHODS)
def test_codes_of_every_method_are_read(folders: Path, ids: Tensor, scheme: str) -> None:
    logits, expected = read(folders, scheme), ours(loaded(folders / "llama"), scheme, ids)
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not torch.equal(expected, ours(loaded(folders / "llama"), "w16", ids))


def test_scales_of_a_cache_are_read(folders: Path, ids: Tensor) -> None:
    logits, checkpoint = read(folders, "w8kv8ts"), loaded(folders / "llama")
    expected, without = ours(checkpoint, "w8kv8ts", ids), ours(checkpoint, "w8", ids)
    # A key that differs in its last place may round to the next code, so single logits may move; on average they do
    # not, beside what rounding the cache does.
    assert (logits - expected).abs().mean() < 0.01 * (without - expected).abs().mean()
    assert torch.equal(choices(logits, ids), choices(expected, ids))


@pytest.mark.parametrize("variant", TWINS)
def test_variants_leave_as_what_transformers_has(folders: Path, ids: Tensor, variant: str) -> None:
    """The twin under the scheme, since gains that are folded into o_proj change its codes."""
    name = f"ours-{variant}"
    assert json.loads((folders / name / "config.json").read_text())["architectures"] == [TWINS[variant]]
    twin, notes = known_to_engines(loaded(folders / variant), "compressed-tensors")
    assert TWINS[variant] in notes[0]
    expected, logits = ours(twin, "w4g32", ids), read(folders, name)
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    sixteen = ours(loaded(folders / variant), "w16", ids)
    assert (ours(twin, "w16", ids) - sixteen).abs().max() < 1e-4 * sixteen.abs().max()


def test_a_twin_generates_as_the_checkpoint_says(folders: Path) -> None:
    checkpoint = loaded(folders / "diff_v1")
    checkpoint.model.generation_config.eos_token_id = [3, 5]
    twin, _ = known_to_engines(checkpoint, "compressed-tensors")
    assert twin.model.generation_config.eos_token_id == [3, 5]


def test_a_variant_without_a_twin_is_sent_to_our_own_format(tmp_path: Path) -> None:
    checkpoint = loaded(save_ours("diff_v2", tmp_path / "in"))
    with pytest.raises(SchemeError, match=r"diff_v2 has no exact twin.*Use --format quantlab"):
        export_checkpoint(checkpoint, Scheme.parse("w4g32"), "compressed-tensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_integer_activations_are_read_on_the_reader_s_own_grid(folders: Path, ids: Tensor) -> None:
    """transformers' step is absmax / 127.5 and its grid holds -128; ours is absmax / 127: codes and scales agree."""
    checkpoint = loaded(folders / "llama")
    with dequantized(checkpoint.model, "w8a8", torch.float32, reader_grid), torch.no_grad():
        expected = checkpoint.model(ids).logits
    found = read(folders, "w8a8")
    # A float that differs in its last place may round to the next code, so this is no bit-for-bit equality.
    assert (found - expected).abs().max() < 1e-3 * expected.std()
    simulated = ours(loaded(folders / "llama"), "w8a8", ids)
    assert not torch.equal(found, simulated)
    assert torch.equal(choices(found, ids), choices(simulated, ids))
    weights_only = ours(loaded(folders / "llama"), "w8", ids)
    # Both grids round the same inputs, the reader's with steps that are no longer than ours.
    assert (found - weights_only).abs().mean() < 1.2 * (simulated - weights_only).abs().mean()


@pytest.mark.parametrize("scheme", ["w4g32", "w8a8"])
def test_a_bfloat16_folder_holds_codes_of_rounded_scales(folders: Path, ids: Tensor, scheme: str) -> None:
    checkpoint = loaded(folders / "llama-bfloat16", "bfloat16")
    grid = reader_grid if scheme == "w8a8" else None
    with dequantized(checkpoint.model, scheme, torch.bfloat16, grid), torch.no_grad():
        expected = checkpoint.model(ids).logits.float()
    found = read(folders, f"bfloat16-{scheme}")
    assert torch.equal(choices(found, ids), choices(expected, ids))
    assert torch.equal(found, expected)


# ---- bytes


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("width", [1, 7, 8, 11, 32, 33, 64, 100])
def test_a_row_is_one_stream_of_bits(bits: int, width: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (3, width), generator=generator).to(torch.uint8)
    packed = pack_rows(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (3, -(-width * bits // 32))
    for row, words in zip(codes.tolist(), packed.tolist(), strict=True):
        stream = sum((word % 2**32) << (32 * position) for position, word in enumerate(words))
        assert stream == sum(code << (bits * position) for position, code in enumerate(row))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_library_unpacks_the_codes_that_we_chose(folders: Path, scheme: str) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    spec = Scheme.parse(scheme).weights
    assert spec is not None
    stored = load_file(folders / scheme / "model.safetensors")
    model = loaded(folders / "llama").model
    for leaf in ("self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj"):
        name = f"model.layers.1.{leaf}"
        chosen = quantize_weight(model.get_submodule(name).weight, spec)
        shape = stored[f"{name}.weight_shape"]
        assert torch.equal(unpack_from_int32(stored[f"{name}.weight_packed"], spec.bits, shape), chosen.codes)
        assert torch.equal(stored[f"{name}.weight_scale"], chosen.scale)
        assert f"{name}.weight" not in stored


def test_integer_weights_are_stored_as_they_are(folders: Path) -> None:
    stored = load_file(folders / "w8a8" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    spec = Scheme.parse("w8a8").weights
    assert spec is not None
    chosen = quantize_weight(loaded(folders / "llama").model.get_submodule(name).weight, spec)
    assert torch.equal(stored[f"{name}.weight"], chosen.codes)
    assert torch.equal(stored[f"{name}.weight_scale"], chosen.scale)
    assert stored[f"{name}.weight"].dtype == torch.int8


def test_the_config_says_what_the_reader_needs(folders: Path) -> None:
    packed = json.loads((folders / "w6g32/config.json").read_text())["quantization_config"]
    assert packed["format"] == "pack-quantized"
    assert packed["quant_method"] == "compressed-tensors"
    assert packed["quantization_status"] == "compressed"
    assert packed["ignore"] == ["lm_head"]
    group = packed["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert group["weights"] == {
        "num_bits": 6,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "dynamic": False,
    }
    assert group["input_activations"] is None
    integer = json.loads((folders / "w8a8/config.json").read_text())["quantization_config"]
    assert integer["format"] == "int-quantized"
    inputs = integer["config_groups"]["group_0"]["input_activations"]
    assert (inputs["num_bits"], inputs["strategy"], inputs["dynamic"]) == (8, "token", True)
