"""Real engines on toy folders, each in a process of its own."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from quantlab.verify import readers
from quantlab.verify.config import VerifyConfig
from quantlab.verify.verify import verify
from tests.quantlab.verify.folders import CONFIG, exported


@pytest.mark.skipif(not find_spec("llama_cpp"), reason="llama-cpp-python is not installed (`make readers`)")
@pytest.mark.parametrize("scheme", ["q8_0", "q4_1"])
def test_llama_cpp_agrees_up_to_the_rounding_of_inputs(scheme: str, toy_folder: Path, tmp_path: Path) -> None:
    folder = exported(toy_folder, tmp_path / "toy", scheme, "gguf")
    certificate = verify(folder, CONFIG.model_copy(update={"engines": ("llama_cpp",)}))
    certificate.check()
    found = certificate.rows[0].agreement
    assert found is not None and found.arithmetic == "q8"
    # It does round: exact products would be a thousand times nearer.
    assert found.gaps["logits"].mean > found.allowed["logits"].mean / 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "format_name"),
    [("w5g32z", "quantlab"), ("w4g32a8-kv8", "quantlab"), ("w8a8", "compressed-tensors"), ("w8", "torchao")],
)
def test_engines_of_this_environment_agree(
    scheme: str, format_name: str, toy_folder: Path, tmp_path: Path
) -> None:
    verify(exported(toy_folder, tmp_path / "toy", scheme, format_name), CONFIG).check()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "format_name"), [("w4g32", "gptq"), ("w4g32z", "gptq"), ("w4g32z", "awq")]
)
def test_engines_of_other_environments_agree(
    scheme: str, format_name: str, toy_folder: Path, tmp_path: Path
) -> None:
    python = readers.python_of("gptqmodel", format_name, VerifyConfig())
    if python is None:
        pytest.skip("gptqmodel is not installed (`make readers`)")
    certificate = verify(exported(toy_folder, tmp_path / "toy", scheme, format_name), CONFIG)
    certificate.check()
    assert {row.engine.name for row in certificate.rows if row.state == "agrees"} >= {"gptqmodel"}


def test_an_engine_has_the_python_that_was_named_or_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = VerifyConfig(environments={"gptqmodel": Path("/somewhere/python")})
    assert readers.python_of("gptqmodel", "gptq", named) == Path("/somewhere/python")
    monkeypatch.setattr(readers, "_is_here", lambda package: package == "transformers")
    monkeypatch.setattr(readers, "REPOSITORY", tmp_path)
    assert readers.python_of("transformers", "compressed-tensors", VerifyConfig()) is not None
    # transformers reads these through gptqmodel, so it runs where that is.
    assert readers.python_of("transformers", "gptq", VerifyConfig()) is None
    python = tmp_path / ".venv-readers-gptq/bin/python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert readers.python_of("transformers", "gptq", VerifyConfig()) == python
    assert readers.python_of("quanto", "quanto", VerifyConfig()) is None
