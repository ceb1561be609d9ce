"""The awq format: its bytes and zero points, its configs, and what gptqmodel and transformers make of it."""

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantlab.errors import CheckpointError, SchemeError
from quantlab.export.awq import pack_outputs
from quantlab.export.formats import find_format
from quantlab.reading import awq as decoder
from quantlab.reading.raw import RawFolder
from quantlab.schemes import Scheme
from tests.quantlab.export import half_folders
from tests.quantlab.export.half_folders import chosen_codes
from tests.quantlab.export.reader_runs import answers, assert_close, needs_reader
from tests.quantlab.export.toy_folders import assert_decoded, save_toy
from tests.toys import toy_model, toy_tokenizer

SOURCES = {
    "llama": ("llama", torch.float32),
    "diffllama": ("diffllama", torch.float32),
    "llama-bfloat16": ("llama", torch.bfloat16),
}
CASES = [
    *(("llama", scheme) for scheme in ("w4g32", "w4g32z", "w4g16", "w4g16z", "w4g32z-awq")),
    *(("diffllama", scheme) for scheme in ("w4g32", "w4g32z")),
    ("llama-bfloat16", "w4g32z"),
]
NAME = "model.layers.1.self_attn.k_proj"


export = partial(half_folders.export, "awq")


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources by name, exports as SOURCE-SCHEME, one of extremes and one that skips linears."""
    root = tmp_path_factory.mktemp("awq")
    for name, (family, dtype) in SOURCES.items():
        save_toy(family, root / name, dtype)
    source = save_toy("llama", root / "extremes")
    tensors = load_file(source / "model.safetensors")
    weight = tensors[f"{NAME}.weight"]
    weight[0], weight[1] = weight[0].abs(), -weight[1].abs()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for source_name, scheme in [*CASES, ("extremes", "w4g32z")]:
        export(root / source_name, scheme, root / f"{source_name}-{scheme}")
    export(root / "llama", "w4g32", root / "skipping", ("*.down_proj", "model.layers.0.self_attn.q_proj"))
    return root


# ---- bytes


@pytest.mark.parametrize("fill", [None, 0, 15])
def test_eight_outputs_share_a_word_even_ones_in_the_lower_half(fill: int | None) -> None:
    drawn = torch.randint(0, 16, (5, 24), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    codes = drawn if fill is None else torch.full_like(drawn, fill)
    packed = pack_outputs(codes)
    assert packed.dtype == torch.int32 and packed.shape == (5, 3)
    for row, words in zip(codes.tolist(), packed.tolist(), strict=True):
        for place, word in enumerate(words):
            eight = row[8 * place : 8 * place + 8]
            expected = sum(code << (4 * bit) for bit, code in enumerate(eight[0::2] + eight[1::2]))
            assert word % 2**32 == expected


@pytest.mark.parametrize(("source", "scheme"), CASES)
def test_the_decoder_finds_what_the_quantizer_chose(folders: Path, source: str, scheme: str) -> None:
    chosen = chosen_codes(folders / source, scheme)
    assert_decoded(decoder, folders / f"{source}-{scheme}", chosen)
    assert (chosen[NAME].zero_OG is None) == ("z" not in scheme)


def test_scales_are_float16_and_the_rest_keeps_its_dtype(folders: Path) -> None:
    stored = load_file(folders / "llama-bfloat16-w4g32z" / "model.safetensors")
    assert stored[f"{NAME}.scales"].dtype == torch.float16
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    assert stored[f"{NAME}.qweight"].shape == (64, 32 // 8)
    assert stored[f"{NAME}.qzeros"].shape == (2, 32 // 8)
    assert stored[f"{NAME}.scales"].shape == (2, 32)


def test_zero_points_of_0_and_of_the_largest_code_are_stored_as_they_are(folders: Path) -> None:
    folder = folders / "extremes-w4g32z"
    word = int(load_file(folder / "model.safetensors")[f"{NAME}.qzeros"][0, 0])
    # Output 0 is in the lowest four bits, output 1 in the fifth four.
    assert (word & 15, word >> 16 & 15) == (0, 15)
    zeros = decoder.decode(RawFolder(folder), NAME).zero_OG
    assert zeros is not None and zeros[:2].tolist() == [[0, 0], [15, 15]]
    assert_decoded(decoder, folder, chosen_codes(folders / "extremes", "w4g32z"))


def test_a_symmetric_grid_has_zero_points_of_8(folders: Path) -> None:
    stored = load_file(folders / "llama-w4g32" / "model.safetensors")[f"{NAME}.qzeros"]
    assert {int(word) % 2**32 for word in stored.flatten()} == {0x88888888}


# ---- configs


@pytest.mark.parametrize("scheme", ["w4g32", "w4g16z"])
def test_the_configs_agree(folders: Path, scheme: str) -> None:
    folder = folders / f"llama-{scheme}"
    config = config_of(folder)
    assert json.loads((folder / "quant_config.json").read_text()) == config
    assert (config["quant_method"], config["version"], config["bits"]) == ("awq", "gemm", 4)
    assert (config["zero_point"], config["modules_to_not_convert"]) == (True, None)
    assert config["group_size"] == (32 if scheme == "w4g32" else 16)


def test_skipped_linears_are_named(folders: Path) -> None:
    config = config_of(folders / "skipping")
    kept = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert sorted([*kept, "lm_head"]) == sorted(config["modules_to_not_convert"])
    assert list(config["dynamic"]) == [f"-:^{re.escape(name)}$" for name in kept]
    assert len(decoder.linears(RawFolder(folders / "skipping"))) == 11


# ---- refusals


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("w3g32", "weights need 4 bits"),
        ("w4", "a scale per group"),
        ("w4g256", "groups need 16, 32, 64 or 128 inputs"),
        ("w4g32z-hqq", "zero points are real numbers"),
        ("w4g32a8", "weights alone"),
    ],
)
def test_a_scheme_that_does_not_fit_is_refused(scheme: str, reason: str) -> None:
    with pytest.raises(SchemeError, match=reason):
        find_format("awq").check(Scheme.parse(scheme))


def test_outputs_that_do_not_fill_words_are_refused(tmp_path: Path) -> None:
    toy_model("llama", head_dim=18, num_key_value_heads=1).save_pretrained(tmp_path / "source")
    toy_tokenizer().save_pretrained(tmp_path / "source")
    with pytest.raises(
        SchemeError, match=r"out_features in multiples of 8: .*k_proj has .*out_features=18\. Add"
    ):
        export(tmp_path / "source", "w4g32", tmp_path / "out", ("*.o_proj",))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("qzeros", torch.zeros(2, 4, dtype=torch.int32), "symmetric grid must be 8"),
        ("qzeros", torch.zeros(2, 5, dtype=torch.int32), r"I32 \[2, 5\], not I32 \[2, 4\]"),
        ("qweight", torch.zeros(63, 4, dtype=torch.int32), "whole groups of 32 rows"),
        ("qweight", torch.zeros(64, dtype=torch.int32), "two dimensions"),
        ("qweight", torch.zeros(64, 4), "F32"),
        ("scales", torch.zeros(2, 32), "F32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    folders: Path, tmp_path: Path, key: str, tensor: Tensor, message: str
) -> None:
    shutil.copytree(folders / "llama-w4g32", tmp_path / "damaged")
    tensors = load_file(tmp_path / "damaged" / "model.safetensors")
    tensors[f"{NAME}.{key}"] = tensor
    save_file(tensors, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        decoder.decode(RawFolder(tmp_path / "damaged"), NAME)


@pytest.mark.parametrize(
    ("key", "value"), [("bits", 8), ("version", "gemv"), ("group_size", 0), ("group_size", None)]
)
def test_a_config_that_does_not_fit_is_refused(
    folders: Path, tmp_path: Path, key: str, value: object
) -> None:
    shutil.copytree(folders / "llama-w4g32", tmp_path / "changed")
    path = tmp_path / "changed" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"][key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="bits 4, version gemm and a positive group_size"):
        decoder.decode(RawFolder(tmp_path / "changed"), NAME)


# ---- engines

READ = {
    "gptqmodel": ["llama-w4g32", "llama-w4g32z", "llama-w4g16z", "skipping"],
    "transformers": [
        *(f"{source}-{scheme}" for source, scheme in CASES if "-" not in source + scheme),
        "skipping",
    ],
}
"""Engine -> folders that it reads."""


@pytest.mark.slow
@pytest.mark.parametrize("engine", [pytest.param(name, marks=needs_reader(name, "awq")) for name in READ])
def test_engines_compute_our_model(folders: Path, tmp_path: Path, engine: str) -> None:
    found = answers(engine, "awq", [folders / name for name in READ[engine]], tmp_path)
    for name in READ[engine]:
        source = folders / ("llama" if name == "skipping" else name.partition("-")[0])
        assert_close(found[name], source, folders / name, torch.float16)
