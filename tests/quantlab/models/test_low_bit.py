"""Folders of low-bit weights in memory: the logits of the model that they were made from, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from probes.profile import profile
from quantlab import pipeline
from quantlab.config import RunConfig
from quantlab.errors import SchemeError
from quantlab.export.tensors import stored_dtype
from quantlab.layers.linear import QuantLinear
from quantlab.models.loading import Checkpoint
from quantlab.models.low_bit import load_low_bit
from quantlab.quantize import quantized
from quantlab.schemes import Scheme
from tests.packed import needs_int4_layout
from tests.quantlab.models.folders import export, loaded, logits, simulated

WIDTHS = {"*.q_proj": "w3g16z", "*.down_proj": "w8", "*.o_proj": "w16"}


def assert_same(source: Path, scheme: str, out: Path, dtype: str = "float32", **options: Any) -> Checkpoint:
    checkpoint = loaded(source, dtype=dtype)
    scale_dtype = stored_dtype(checkpoint.model, checkpoint.info.source_precision)
    export(checkpoint, scheme, out, **options)
    again = load_low_bit(out, dtype=dtype, device="cpu", kernel=options.get("kernel", "integer"))
    assert torch.equal(logits(again), simulated(checkpoint, scheme, scale_dtype, **options))
    assert not torch.equal(logits(again), logits(checkpoint))
    return again


ON_LLAMA = [
    *(
        "w4g32",
        "w3g16z",
        "w6",
        "w8a8",
        "w8a8t",
        "w4a4cs",
        "w8a8ts",
        "w4t",
        "w4g32z-hqq",
        "w4g32-gptq",
        "w4g32-awq",
    ),
    *(
        "w4g32-smooth",
        "w4a8-rotate",
        "w4g32-bias",
        "nf4",
        "fp8",
        "mxfp4",
        "nvfp4",
        "llm_int8",
        "q4_k",
        "q6_k",
    ),
    *("w4g64kv4", "w4g32l6t", "w4q8k8-rotate", "w4q8hsk8csv8ts", "w4kv8ts", "w4x8", "w4kv4-spin"),
]
ELSEWHERE = [
    ("qwen2", "w4g32"),
    ("qwen2", "w8a8ts"),
    ("qwen2", "w4g32-bias"),
    ("qwen2", "w4a8-rotate"),
    ("gpt2", "w3g16z"),
    ("gpt2", "w8a8"),
    ("gpt2", "w4g32-bias"),
    ("gpt2", "q4_k"),
    ("diffllama", "w4g32-awq"),
    ("diffllama", "w8a8"),
    ("diffllama", "w4l6tm2"),
    ("diff_v1", "w4g64"),
    ("diff_v1", "w4a8-rotate"),
    ("diff_v1", "w4e8t"),
    ("diff_v2", "w3g64z"),
    ("diff_v2", "w4d8l6tm2"),
    ("opt", "w4-fold"),
]


@pytest.mark.parametrize("scheme", ON_LLAMA)
def test_logits_are_the_same_bits(source: Callable[..., Path], tmp_path: Path, scheme: str) -> None:
    again = assert_same(source("llama"), scheme, tmp_path / "out")
    assert again.scheme == Scheme.parse(scheme)
    assert again.info.source_precision == f"quantlab {Scheme.parse(scheme).name}"


@pytest.mark.parametrize(("family", "scheme"), ELSEWHERE)
def test_so_they_are_for_other_architectures(
    source: Callable[..., Path], tmp_path: Path, family: str, scheme: str
) -> None:
    assert_same(source(family), scheme, tmp_path / "out")


@pytest.mark.parametrize("scheme", ["w4g32-mixed", "w4a8-mixed", "w4a8ts-rotate-mixed"])
def test_widths_of_their_own(source: Callable[..., Path], tmp_path: Path, scheme: str) -> None:
    assert_same(source("llama"), scheme, tmp_path / "out", widths=WIDTHS)


def test_a_skipped_linear_that_is_rotated_keeps_its_inputs(
    source: Callable[..., Path], tmp_path: Path
) -> None:
    assert_same(source("llama"), "w4a8-rotate", tmp_path / "out", skip=("*.0.mlp.down_proj",))


@pytest.mark.parametrize("kernel", ["simulated", pytest.param("packed", marks=needs_int4_layout)])
def test_kernels_are_as_asked(source: Callable[..., Path], tmp_path: Path, kernel: str) -> None:
    again = assert_same(source("llama"), "w4g64", tmp_path / "out", "bfloat16", kernel=kernel)
    kernels = {module.kernel for module in again.model.modules() if isinstance(module, QuantLinear)}
    assert kernels == {"int4_packed" if kernel == "packed" else "weight_only"}


def test_a_bias_that_folding_made_is_found_again(source: Callable[..., Path], tmp_path: Path) -> None:
    folder = source("gpt_neox", attention_bias=False)
    checkpoint = loaded(folder)
    with torch.no_grad():
        for name, parameter in checkpoint.model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.linspace(-0.3, 0.4, parameter.numel()))
    export(checkpoint, "w4-fold", tmp_path / "out")
    again = load_low_bit(tmp_path / "out", device="cpu")
    assert torch.equal(logits(again), simulated(checkpoint, "w4-fold", torch.float32))
    assert again.model.get_submodule("gpt_neox.layers.0.attention.query_key_value").bias is not None


def test_tied_heads_stay_tied_or_are_untied_and_said_so(source: Callable[..., Path], tmp_path: Path) -> None:
    folder = source("llama", tie_word_embeddings=True)
    tied = assert_same(folder, "w4", tmp_path / "tied").model
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    notes = export(loaded(folder), "w4-rotate", tmp_path / "untied").notes
    assert any("lm_head was tied to" in note for note in notes)
    untied = load_low_bit(tmp_path / "untied", device="cpu").model
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert_same(folder, "w4-rotate", tmp_path / "again")


def test_linears_that_share_a_matrix_share_its_codes(source: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = loaded(source("llama"))
    first, second = (layer.self_attn for layer in checkpoint.model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    export(checkpoint, "w4a8ts", tmp_path / "out")
    entries = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["linears"]
    assert entries["model.layers.1.self_attn.q_proj"]["as"] == "model.layers.0.self_attn.q_proj"
    again = load_low_bit(tmp_path / "out", device="cpu")
    assert torch.equal(logits(again), simulated(checkpoint, "w4a8ts", torch.float32))


FOLDERS = [
    ("compressed-tensors", "w6g32"),
    ("compressed-tensors", "w8a8"),
    ("compressed-tensors", "fp8"),
    ("compressed-tensors", "w8kv8ts"),
    ("gptq", "w3g32z"),
    ("awq", "w4g32z"),
    ("bitsandbytes", "nf4"),
    ("bitsandbytes", "llm_int8"),
    ("torchao", "w4g32"),
    ("quanto", "w8"),
]


@pytest.mark.parametrize(("form", "scheme"), FOLDERS)
def test_folders_of_other_formats(
    source: Callable[..., Path], tmp_path: Path, form: str, scheme: str
) -> None:
    checkpoint = loaded(source("llama"))
    export(checkpoint, scheme, tmp_path / "out", form)
    again = load_low_bit(tmp_path / "out", device="cpu")
    scale_dtype = torch.float16 if form in ("gptq", "awq") else torch.float32
    assert torch.equal(logits(again), simulated(checkpoint, scheme, scale_dtype))
    assert again.info.linears == checkpoint.info.linears
    assert again.info.num_parameters == checkpoint.info.num_parameters
    assert again.info.source_precision == f"{form} {scheme}"


def test_without_a_recipe_a_folder_is_its_weights(source: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = loaded(source("llama"))
    export(checkpoint, "w4g32", tmp_path / "out", "compressed-tensors")
    (tmp_path / "out/recipe.json").unlink()
    again = load_low_bit(tmp_path / "out", device="cpu")
    assert again.scheme is None and again.info.source_precision == "compressed-tensors"
    assert torch.equal(logits(again), simulated(checkpoint, "w4g32", torch.float32))


def test_load_checkpoint_takes_such_a_folder_as_what_it_is(
    source: Callable[..., Path], tmp_path: Path
) -> None:
    original, out = loaded(source("llama")), tmp_path / "out"
    export(original, "w4a8tsv8ts-bias", out)
    again = loaded(out)
    assert again.scheme is not None and again.scheme.name == "w4a8tsv8ts-bias"
    assert (
        again.info.carries == "w4a8tsv8ts-bias" and again.info.source_precision == "quantlab w4a8tsv8ts-bias"
    )
    assert again.info.linears == original.info.linears
    assert again.info.vocab_size == original.info.vocab_size
    with quantized(again.model, Scheme()):
        assert torch.equal(logits(again), logits(load_low_bit(out, device="cpu")))
    with (
        pytest.raises(
            SchemeError, match=r"this one carries one already\. Load it anew, or the checkpoint that"
        ),
        quantized(again.model, Scheme.parse("w8")),
    ):
        pass


def test_the_baseline_of_a_folder_tells_its_bits(source: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = loaded(source("llama"))
    summary = export(checkpoint, "w4g32-mixed", tmp_path / "out", widths=WIDTHS)
    again = loaded(tmp_path / "out")
    with quantized(again.model, Scheme()) as changes:
        found = changes.summary()
    rows = {row.name: row for row in changes.rows}
    assert rows["model.layers.0.mlp.up_proj"].bits == 4 and rows["model.layers.1.mlp.down_proj"].bits == 8
    # 4-bit codes and a float32 scale for each 32 of them.
    assert rows["model.layers.0.mlp.up_proj"].storage_bits == 256 * 64 * 5
    assert rows["model.layers.0.self_attn.o_proj"].bits == 16
    assert set(found["share_by_bits"]) == {"3", "4", "8", "16"}
    assert changes.num_parameters == sum(each.numel() for each in checkpoint.model.parameters())
    assert len(summary.swapped) == len(rows)


def test_scores_of_a_folder_are_those_of_its_scheme(source: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, scheme = loaded(source("llama")), "w8a8l6t"
    export(checkpoint, scheme, tmp_path / "out")

    def scored(checkpoint: Checkpoint, name: str) -> tuple[dict[str, Any], Any]:
        config = RunConfig.model_validate(
            {
                "checkpoints": [{"path": str(checkpoint.info.path), "device": "cpu"}],
                "evaluation": {"tasks": ["hellaswag"], "hellaswag": {"limit": 3}},
                "schemes": [name],
            }
        )
        pipeline.check(config)
        result, items = pipeline.evaluate_cell(checkpoint, Scheme.parse(name), config, lambda count: None)
        return result, items["hellaswag"]

    (there, wanted), (here, found) = scored(checkpoint, scheme), scored(loaded(tmp_path / "out"), "w16")
    assert all((found[column] == wanted[column]).all() for column in wanted)
    assert here["attention"] == there["attention"]
    # A scale that spans tokens belongs to one sequence, so no two share a row.
    assert here["hellaswag"]["sharing"] == there["hellaswag"]["sharing"] == "none"
    with pytest.raises(SchemeError, match="carries w8a8l6t, and w8 was asked for"):
        scored(loaded(tmp_path / "out"), "w8")


def test_a_folder_of_ours_is_profiled(source: Callable[..., Path], tmp_path: Path) -> None:
    """Its weights are the real ones that its codes stand for."""
    checkpoint = loaded(source("llama"))
    export(checkpoint, "w8g32", tmp_path / "out")
    ids = torch.arange(1, 33).reshape(1, 32)
    names = ["weight_incoherence"]
    ours, theirs = (
        profile(each.model, ids, statistics=names).measures["weight_incoherence"]
        for each in (load_low_bit(tmp_path / "out", device="cpu"), checkpoint)
    )
    # Rounding moves a weight by half a step at most: 1/254 of the largest of its group.
    assert ours["largest_tensor"] == theirs["largest_tensor"]
    assert ours["max"] == pytest.approx(theirs["max"], rel=0.02)
