"""The gptq format: its bytes, zero points and configs, and what gptqmodel, transformers and auto-gptq make of it."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantlab.errors import CheckpointError, SchemeError
from quantlab.export import gptq
from quantlab.export.codes import Codes
from quantlab.export.engines import of_gptq
from quantlab.export.formats import find_format
from quantlab.export.gptq import layout, pack_words
from quantlab.export.job import ExportJob
from quantlab.quantize import prepared
from quantlab.reading import gptq as decoder
from quantlab.reading.raw import RawFolder
from quantlab.schemes import Scheme
from tests.quantlab.export import half_folders
from tests.quantlab.export.half_folders import chosen_codes
from tests.quantlab.export.reader_runs import answers, assert_close, dense_logits, needs_reader
from tests.quantlab.export.toy_folders import assert_decoded, loaded, save_toy

SOURCES = {
    "llama": ("llama", torch.float32),
    "diffllama": ("diffllama", torch.float32),
    "llama-bfloat16": ("llama", torch.bfloat16),
}
V1 = ["w2g32", "w3g32", "w4g32", "w4", "w8", "w4g32-gptq"]
V2 = ["w2g16z", "w3g32z", "w4g32z", "w4z", "w8z"]
PLANAR = ["w5", "w6g32", "w7g16", "w6g32z"]
CASES = [
    *(("llama", scheme) for scheme in V1 + V2 + PLANAR),
    *(("diffllama", scheme) for scheme in ("w4g32", "w3g32z")),
    *(("llama-bfloat16", scheme) for scheme in ("w4g32", "w4g32z")),
]
NAME = "model.layers.1.self_attn.k_proj"


export = partial(half_folders.export, "gptq")


def save_extremes(folder: Path) -> Path:
    """A toy Llama some of whose outputs have positive weights alone, some negative ones."""
    save_toy("llama", folder)
    tensors = load_file(folder / "model.safetensors")
    weight = tensors[f"{NAME}.weight"]
    weight[0], weight[1] = weight[0].abs(), -weight[1].abs()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources by name, exports as SOURCE-SCHEME, and one that skips linears."""
    root = tmp_path_factory.mktemp("gptq")
    for name, (family, dtype) in SOURCES.items():
        save_toy(family, root / name, dtype)
    save_extremes(root / "extremes")
    for source, scheme in [*CASES, ("extremes", "w4g32z")]:
        export(root / source, scheme, root / f"{source}-{scheme}")
    export(root / "llama", "w4g32", root / "skipping", ("*.down_proj", "model.layers.0.self_attn.q_proj"))
    return root


@contextmanager
def job_of(source: Path, name: str) -> Iterator[ExportJob]:
    """What a writer is given."""
    checkpoint, scheme = loaded(source), Scheme.parse(name)
    model = checkpoint.model
    with prepared(model, scheme, scale_dtype=torch.float16) as ready:
        yield ExportJob(
            model,
            checkpoint.tokenizer,
            checkpoint.info,
            scheme,
            ready.linears,
            model.dtype,
            Codes(ready.solve),
            10**9,
            lambda count: None,
            ready,
        )


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config


# ---- bytes


def codes_of(bits: int, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(bits)
    drawn = torch.randint(0, 2**bits, (3, 96), generator=generator).to(torch.uint8)
    if kind == "random":
        return drawn
    return torch.full_like(drawn, 0 if kind == "zeros" else 2**bits - 1)


def stream(codes: list[int], bits: int) -> list[int]:
    """Codes as words, by one long integer."""
    total = sum(code << (bits * place) for place, code in enumerate(codes))
    return [(total >> (32 * word)) % 2**32 for word in range(len(codes) * bits // 32)]


@pytest.mark.parametrize("kind", ["random", "zeros", "largest"])
@pytest.mark.parametrize(
    ("bits", "planes"), [(2, [2]), (3, [3]), (4, [4]), (8, [8]), (5, [4, 1]), (6, [4, 2]), (7, [4, 2, 1])]
)
def test_32_codes_are_as_many_words_as_bits(bits: int, planes: list[int], kind: str) -> None:
    codes = codes_of(bits, kind)
    packed = pack_words(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (3, 3 * bits)
    for row, words in zip(codes.tolist(), packed.tolist(), strict=True):
        expected, shift = [], 0
        for block in (row[0:32], row[32:64], row[64:96]):
            shift = 0
            for width in planes:
                expected += stream([(code >> shift) % 2**width for code in block], width)
                shift += width
        assert [word % 2**32 for word in words] == expected


@pytest.mark.parametrize(("source", "scheme"), CASES)
def test_the_decoder_finds_what_the_quantizer_chose(folders: Path, source: str, scheme: str) -> None:
    assert_decoded(decoder, folders / f"{source}-{scheme}", chosen_codes(folders / source, scheme))


def test_scales_are_float16_and_the_rest_keeps_its_dtype(folders: Path) -> None:
    stored = load_file(folders / "llama-bfloat16-w4g32" / "model.safetensors")
    assert stored[f"{NAME}.scales"].dtype == torch.float16
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    # bfloat16 scales would have zeros in the last bits of all of them.
    assert not torch.equal(stored[f"{NAME}.scales"].bfloat16().half(), stored[f"{NAME}.scales"])
    card = (folders / "llama-bfloat16-w4g32" / "README.md").read_text()
    assert "| scales | float16 |" in card and "| kept in bfloat16 |" in card


@pytest.mark.parametrize(("scheme", "groups"), [("w4g32", 2), ("w4", 1), ("w4g32-gptq", 2)])
def test_groups_are_whole_and_g_idx_says_so(folders: Path, scheme: str, groups: int) -> None:
    stored = load_file(folders / f"llama-{scheme}" / "model.safetensors")
    expected = torch.arange(groups, dtype=torch.int32).repeat_interleave(64 // groups)
    assert torch.equal(stored[f"{NAME}.g_idx"], expected)
    assert stored[f"{NAME}.qweight"].shape == (64 * 4 // 32, 32)
    assert stored[f"{NAME}.qzeros"].shape == (groups, 32 * 4 // 32)
    assert config_of(folders / f"llama-{scheme}")["desc_act"] is False


# ---- zero points


def first_zeros(words: Tensor) -> list[int]:
    """Of outputs 0 and 1 in the first group, 4 bits each."""
    word = int(words[0, 0])
    return [word & 15, word >> 4 & 15]


def test_v2_stores_zero_points_of_0_and_of_the_largest_code(folders: Path) -> None:
    folder = folders / "extremes-w4g32z"
    assert config_of(folder)["checkpoint_format"] == "gptq_v2"
    assert first_zeros(load_file(folder / "model.safetensors")[f"{NAME}.qzeros"]) == [0, 15]
    zeros = decoder.decode(RawFolder(folder), NAME).zero_OG
    assert zeros is not None and zeros[:2].tolist() == [[0, 0], [15, 15]]
    assert_decoded(decoder, folder, chosen_codes(folders / "extremes", "w4g32z"))


def test_v1_refuses_a_zero_point_of_0(folders: Path) -> None:
    with job_of(folders / "extremes", "w4g32z") as job:
        parts = layout(job, "gptq").linears
        with pytest.raises(SchemeError, match=f"at least 1 .*{NAME} has 2 of 0. Use gptq_v2"):
            parts[NAME].build()


def test_v1_stores_zero_points_less_one(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_toy("llama", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors[f"{NAME}.weight"][1] = -tensors[f"{NAME}.weight"][1].abs()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(gptq, "_checkpoint_format", lambda spec: "gptq")
    folder = export(source, "w4g32z", tmp_path / "out")
    assert config_of(folder)["checkpoint_format"] == "gptq"
    assert first_zeros(load_file(folder / "model.safetensors")[f"{NAME}.qzeros"])[1] == 14
    zeros = decoder.decode(RawFolder(folder), NAME).zero_OG
    assert zeros is not None and zeros[1].tolist() == [15, 15]
    assert_decoded(decoder, folder, chosen_codes(source, "w4g32z"))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_symmetric_grid_has_one_zero_point(folders: Path, bits: int) -> None:
    scheme = {2: "w2g32", 3: "w3g32", 4: "w4g32", 8: "w8"}[bits]
    stored = load_file(folders / f"llama-{scheme}" / "model.safetensors")[f"{NAME}.qzeros"]
    zeros = pack_words(torch.full((len(stored), 32), 2 ** (bits - 1) - 1, dtype=torch.uint8), bits)
    assert torch.equal(stored, zeros)
    assert decoder.decode(RawFolder(folders / f"llama-{scheme}"), NAME).zero_OG is None


# ---- configs


@pytest.mark.parametrize("scheme", V1 + V2 + PLANAR)
def test_the_configs_agree(folders: Path, scheme: str) -> None:
    folder, spec = folders / f"llama-{scheme}", Scheme.parse(scheme).weights
    assert spec is not None
    config = config_of(folder)
    stored = "gptq" if scheme in V1 else "gptq_v2" if scheme in V2 else "gptq_p"
    assert config["quant_method"] == "gptq"
    assert config["checkpoint_format"] == config["format"] == stored
    assert (config["bits"], config["group_size"]) == (spec.bits, spec.group_size or -1)
    assert config["sym"] is not scheme.endswith("z")
    # auto-gptq reads every folder as v1, and stops where this file is missing.
    assert (folder / "quantize_config.json").exists() == (stored == "gptq")
    if stored == "gptq":
        assert json.loads((folder / "quantize_config.json").read_text()) == config


def test_skipped_linears_are_named_for_every_reader_that_can_be_told(folders: Path) -> None:
    folder = folders / "skipping"
    config = config_of(folder)
    kept = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert list(config["dynamic"]) == [f"-:^{re.escape(name)}$" for name in kept]
    (held,) = config["modules_in_block_to_quantize"]
    assert sorted(held) == decoder.linears(RawFolder(folder))
    assert len(held) == 11 and not set(held) & set(kept)
    assert not (folder / "quantize_config.json").exists()


def test_the_engine_matrix_knows_who_reads_what() -> None:
    loads = {
        name: {each.name: each.loads for each in of_gptq(Scheme.parse(name))}
        for name in ("w4g32", "w4g32z", "w6")
    }
    assert loads["w4g32"] == {
        "gptqmodel": "here", "transformers": "here", "auto_gptq": "here", "vLLM": "elsewhere"
    }  # fmt: skip
    assert loads["w4g32z"]["auto_gptq"] == "no" and loads["w4g32z"]["transformers"] == "here"
    assert loads["w6"] == {"gptqmodel": "here", "transformers": "no", "auto_gptq": "no", "vLLM": "no"}


# ---- refusals


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("w4g48", "groups need 16, 32, 64, 128, 256, 512 or 1024 inputs"),
        ("w4g32z-hqq", "zero points are real numbers"),
        ("w4t", "per channel or per group"),
        ("w8a8", "weights alone"),
        ("nf4", "its weights are nf4"),
    ],
)
def test_a_scheme_that_does_not_fit_is_refused(scheme: str, reason: str) -> None:
    with pytest.raises(SchemeError, match=reason):
        find_format("gptq").check(Scheme.parse(scheme))


def test_features_that_do_not_fill_words_are_refused(tmp_path: Path) -> None:
    source = save_toy("llama", tmp_path / "source", width=80)
    with pytest.raises(
        SchemeError, match=r"multiples of 32: .*gate_proj has in_features=64 and out_features=80\. Add"
    ):
        export(source, "w4", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def damaged(folders: Path, tmp_path: Path, key: str, tensor: Tensor) -> RawFolder:
    out = tmp_path / "damaged"
    shutil.copytree(folders / "llama-w4g32", out)
    tensors = load_file(out / "model.safetensors")
    tensors[f"{NAME}.{key}"] = tensor
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return RawFolder(out)


def reconfigured(folder: Path, out: Path, **changes: object) -> Path:
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= changes
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("g_idx", torch.arange(64, dtype=torch.int32).flip(0) // 32, "g_idx scatters groups"),
        ("g_idx", torch.zeros(32, dtype=torch.int32), r"I32 \[32\], not I32 \[64\]"),
        ("qzeros", torch.full((2, 4), -1, dtype=torch.int32), "stands for 16, beyond the grid"),
        ("qzeros", torch.zeros(2, 4, dtype=torch.int32), "symmetric grid has another zero point"),
        ("qzeros", torch.zeros(2, 5, dtype=torch.int32), r"I32 \[2, 5\], not I32 \[2, 4\]"),
        ("qweight", torch.zeros(9, 32, dtype=torch.int32), "no multiples of 32"),
        ("qweight", torch.zeros(12, 32, dtype=torch.int32), r"\[2, 4\], not I32 \[3, 4\]"),
        ("qweight", torch.zeros(8, 32), "F32"),
        ("qweight", torch.zeros(8, dtype=torch.int32), "two dimensions"),
        ("scales", torch.zeros(2, 32), "F32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    folders: Path, tmp_path: Path, key: str, tensor: Tensor, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        decoder.decode(damaged(folders, tmp_path, key, tensor), NAME)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bits", 9, "bits must be 2 to 8"),
        ("bits", True, "bits must be 2 to 8"),
        ("bits", 6, "gptq_p with 5, 6 or 7 bits"),
        ("group_size", 0, "group_size must be -1 or positive"),
        ("group_size", 24, "groups of 24 do not divide 64"),
        ("checkpoint_format", "marlin", "'marlin'"),
        ("checkpoint_format", ["gptq"], "gptq_v2"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    folders: Path, tmp_path: Path, key: str, value: object, message: str
) -> None:
    changed = reconfigured(folders / "llama-w4g32", tmp_path / "changed", **{key: value})
    with pytest.raises(CheckpointError, match=message):
        decoder.decode(RawFolder(changed), NAME)


# ---- engines

READ = {
    "gptqmodel": [
        *(f"llama-{scheme}" for scheme in V1 + V2 + PLANAR),
        "diffllama-w4g32",
        "diffllama-w3g32z",
        "skipping",
    ],
    "transformers": [
        *(f"llama-{scheme}" for scheme in V1 + V2),
        "diffllama-w4g32",
        "diffllama-w3g32z",
        "skipping",
    ],
    "auto_gptq": [f"llama-{scheme}" for scheme in V1],
}
"""Engine -> folders that it reads."""
STOPS = ["llama-w4g32z", "skipping"]
"""Folders that auto-gptq would read wrongly."""


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=needs_reader(name, "gptq")) for name in READ]
)
def answered(
    request: pytest.FixtureRequest, folders: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any]]:
    """An engine, and what it answers to each of its folders."""
    engine: str = request.param
    names = READ[engine] + (STOPS if engine == "auto_gptq" else [])
    return engine, answers(
        engine, "gptq", [folders / name for name in names], tmp_path_factory.mktemp(engine)
    )


@pytest.mark.slow
def test_engines_compute_our_model(folders: Path, answered: tuple[str, dict[str, Any]]) -> None:
    engine, found = answered
    for name in READ[engine]:
        source = folders / ("llama" if name == "skipping" else name.partition("-")[0])
        dtype = torch.float32 if engine == "auto_gptq" else torch.float16
        assert_close(found[name], source, folders / name, dtype)
    if engine == "auto_gptq":
        assert all("quantize_config.json" in found[name] for name in STOPS)


def test_float16_does_not_explain_a_wrong_zero_point(folders: Path, tmp_path: Path) -> None:
    """The bound of the tests above tells conventions apart: v2 read as v1 is beyond it."""
    folder, source = folders / "llama-w4g32z", folders / "llama"
    misread = reconfigured(folder, tmp_path / "misread", checkpoint_format="gptq")
    found = dense_logits(source, misread, torch.float64)
    with pytest.raises(AssertionError, match="where plain torch has"):
        assert_close(found, source, folder, torch.float16)
