"""`verify`: what a true folder gets, and that every way in which a folder can be wrong is named."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quantlab.errors import CheckpointError, ConfigError, OutputError, VerificationError
from quantlab.manifest import check_files, read_manifest
from quantlab.verify import readers
from quantlab.verify.certificate import Certificate, content_digest
from quantlab.verify.config import VerifyConfig
from quantlab.verify.verify import verify
from tests.quantlab.verify.folders import CONFIG, LINEAR, changed_json, fake_engine, sealed, tampered

Tensors = dict[str, NDArray[Any]]


@pytest.fixture
def folder(low_bit_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(low_bit_folder, tmp_path / "toy-w4g32"))


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path, str], None]:
    """Puts an engine in transformers' place that does what is asked after looking up our model's answers."""

    def put(folder: Path, change: str = "") -> None:
        monkeypatch.setattr(readers, "ENGINES", fake_engine(tmp_path / "engines", folder, change))

    return put


def row(certificate: Certificate, name: str = "transformers") -> Any:
    return next(row for row in certificate.rows if row.engine.name == name)


def test_transformers_loads_a_true_folder_and_agrees(folder: Path) -> None:
    counted: list[int] = []
    certificate = verify(folder, CONFIG, counted.append)
    certificate.check()
    assert certificate.verified and certificate.verdict.startswith("Verified: 14 linears")
    assert sum(counted) == 14 + 1
    found = row(certificate)
    assert found.state == "agrees" and found.peak_bytes > 0 and "compressed-tensors" in found.versions
    # The embedding's output is copied; everything else is computed, in another order of sums.
    assert found.agreement.gaps["hidden 0"].largest == 0.0 < found.agreement.gaps["logits"].largest
    assert set(found.agreement.gaps) == {"hidden 0", "hidden 1", "hidden 2", "logits"}
    assert found.agreement.num_documents == 2 and not found.agreement.flips
    assert row(certificate, "vLLM").state == "should load"
    body = json.loads((folder / "certificate.json").read_text())
    assert body["verified"] is True and body["certifies"] == content_digest(check_files(folder))
    assert certificate.verdict in (folder / "README.md").read_text()


def test_verifying_again_gives_the_same_bytes(folder: Path, engines: Any) -> None:
    engines(folder)
    names = ("certificate.json", "README.md", "MANIFEST.json")
    assert verify(folder, CONFIG).verified
    once = {name: (folder / name).read_bytes() for name in names}
    assert verify(folder, CONFIG).verified
    assert {name: (folder / name).read_bytes() for name in names} == once
    assert once["README.md"].count(b"## Certificate") == 1
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def change_code(tensors: Tensors) -> None:
    tensors[f"{LINEAR}.weight_packed"][3, 2] ^= 1


def change_scale(tensors: Tensors) -> None:
    tensors[f"{LINEAR}.weight_scale"][3, 1] *= np.float32(1 + 2**-23)


def lose_scale(tensors: Tensors) -> None:
    tensors[f"{LINEAR}.weight_scale"][3, 1] = np.nan


def add_linear(tensors: Tensors) -> None:
    for leaf in ("weight_packed", "weight_scale", "weight_shape"):
        tensors[f"model.layers.2.mlp.up_proj.{leaf}"] = tensors[f"{LINEAR}.{leaf}"].copy()


def add_tensor(tensors: Tensors) -> None:
    tensors["model.layers.0.extra"] = np.zeros(3, np.float32)


def drop_linear(tensors: Tensors) -> None:
    for leaf in ("weight_packed", "weight_scale", "weight_shape"):
        del tensors[f"{LINEAR}.{leaf}"]


def drop_norm(tensors: Tensors) -> None:
    del tensors["model.norm.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_code, f"codes must be those that the quantizer chose: {LINEAR}"),
        (change_scale, f"scales must be those that the quantizer chose: {LINEAR}"),
        (lose_scale, f"scales must be finite: {LINEAR}"),
        (add_linear, "linears of the folder must be in its manifest: model.layers.2.mlp.up_proj"),
        (drop_linear, f"linears of the manifest must be in the folder: {LINEAR}"),
        (add_tensor, "has no place for"),
        (drop_norm, "has no 'model.norm.weight'"),
    ],
)
def test_a_change_under_a_new_seal_is_named_and_certified_as_failed(
    low_bit_folder: Path, tmp_path: Path, change: Callable[[Tensors], None], message: str
) -> None:
    folder = tampered(low_bit_folder, tmp_path / "bad", change)
    certificate = verify(folder, CONFIG)
    with pytest.raises(VerificationError) as caught:
        certificate.check()
    assert message in str(caught.value)
    check_files(folder)
    body = json.loads((folder / "certificate.json").read_text())
    assert body["verified"] is False and message in body["failures"][0]
    assert f"Not verified: {body['failures'][0]}." == body["verdict"]
    # No engine is shown a folder that is known to be wrong.
    assert row(certificate).state == "not run"


def test_a_folder_without_low_bits_is_not_verified(low_bit_folder: Path, tmp_path: Path) -> None:
    def drop_all(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".weight_" in name]:
            del tensors[name]

    folder = sealed(tampered(low_bit_folder, tmp_path / "bad", drop_all), {})
    with pytest.raises(
        VerificationError, match="a folder of w4g32 must hold linears in low bits: bad has none"
    ):
        verify(folder, CONFIG).check()


def test_no_engine_is_shown_a_config_that_names_attention_to_fetch(folder: Path) -> None:
    changed_json(folder / "config.json", _attn_implementation="someone/kernel")
    certificate = verify(sealed(folder), CONFIG)
    with pytest.raises(VerificationError, match="must not set '_attn_implementation' to what engines fetch"):
        certificate.check()
    assert row(certificate).state == "not run"


def test_bits_on_disk_are_those_of_the_recipe(folder: Path) -> None:
    bits = json.loads((folder / "recipe.json").read_text())["average_storage_bits"]
    # One byte of 61,440 weights' codes.
    changed_json(folder / "recipe.json", average_storage_bits=bits + 8 / 61_440)
    with pytest.raises(VerificationError, match=r"must take 38,625 bytes, by recipe\.json: they take 38,624"):
        verify(sealed(folder), CONFIG).check()


def test_a_file_that_is_not_as_listed_is_named_and_nothing_is_written(folder: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    before = (folder / "MANIFEST.json").read_bytes()
    with pytest.raises(VerificationError, match=r"config\.json was changed"):
        verify(folder, CONFIG)
    assert (folder / "MANIFEST.json").read_bytes() == before and not (folder / "certificate.json").exists()


def test_any_flipped_bit_is_found(folder: Path, engines: Any) -> None:
    engines(folder)
    assert verify(folder, CONFIG).verified
    draw = np.random.default_rng(0)
    files = sorted(path for path in folder.iterdir())
    assert {"certificate.json", "MANIFEST.json", "model.safetensors"} < {path.name for path in files}
    found = 0
    for _ in range(1000):
        path = files[draw.integers(len(files))]
        content = bytearray(path.read_bytes())
        content[draw.integers(len(content))] ^= 1 << int(draw.integers(8))
        original = path.read_bytes()
        path.write_bytes(content)
        try:
            check_files(folder)
        except CheckpointError:
            found += 1
        path.write_bytes(original)
    assert found == 1000
    check_files(folder)


@pytest.mark.parametrize(
    ("change", "state", "reason"),
    [
        ("raise MemoryError('no room')", "failed", "ended with code 1: MemoryError: no room"),
        ("import os; os.abort()", "failed", "ended by SIGABRT"),
        ("logits = logits[1:] if len(ids) == 16 else logits", "failed", "other shapes"),
        ("logits[0, 0] = np.nan", "disagrees", "beyond what float32 explains: logits"),
        ("logits[-1, 7] += 1e-4", "disagrees", "beyond what float32 explains: logits"),
        ("hidden[1] = hidden[1] * 1.01", "disagrees", "beyond what float32 explains: hidden 1"),
        ("hidden = hidden[:2]", "disagrees", "beyond what float32 explains: hidden 2"),
        ("logits = logits[:, 1:] if len(ids) == 16 else logits", "disagrees", "explains: logits"),
    ],
)
def test_an_engine_that_is_wrong_is_a_row_and_no_verification(
    folder: Path, engines: Any, change: str, state: str, reason: str
) -> None:
    engines(folder, change)
    certificate = verify(folder, CONFIG)
    found = row(certificate)
    assert found.state == state and reason in found.reason, found
    with pytest.raises(VerificationError, match="transformers"):
        certificate.check()
    assert json.loads((folder / "certificate.json").read_text())["engines"][0]["state"] == state


def test_an_engine_that_hangs_is_stopped(folder: Path, engines: Any) -> None:
    engines(folder, "import time; time.sleep(60)")
    found = row(verify(folder, CONFIG.model_copy(update={"timeout_s": 1.5})))
    assert (found.state, found.reason) == ("failed", "it took more than 1.5 s")


@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is read from /proc")
def test_an_engine_that_takes_too_much_memory_is_stopped(folder: Path, engines: Any) -> None:
    engines(folder, "import time; block = np.ones(40_000_000); time.sleep(60)")
    found = row(verify(folder, CONFIG.model_copy(update={"memory_bytes": 200_000_000})))
    assert found.state == "failed" and "more than the 200,000,000 allowed" in found.reason


def test_an_engine_that_is_not_there_is_never_said_to_have_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_is_here", lambda package: False)
    certificate = verify(folder, CONFIG)
    assert row(certificate).state == "not run" and "make readers" in row(certificate).reason
    with pytest.raises(VerificationError, match="an engine must load the folder: none did"):
        certificate.check()


def test_answers_that_differ_are_listed_with_both_margins(folder: Path, engines: Any) -> None:
    # Every other row becomes likely; the probes, which are shorter, keep their logits.
    engines(folder, "logits[np.arange(len(ids) - 1), ids[1:]] += 30 * (len(ids) != 16 and sum(ids) % 2)")
    certificate = verify(folder, CONFIG)
    flips = row(certificate).agreement.flips
    assert certificate.verified and flips
    for flip in flips:
        assert flip.ours != flip.theirs and flip.score in ("acc", "acc_norm")
        assert np.isfinite([flip.our_margin, flip.their_margin]).all()
    card = (folder / "README.md").read_text()
    assert all(f"| transformers | {flip.document} | {flip.score} |" in card for flip in flips)


def test_engines_can_be_chosen_and_unknown_ones_are_refused(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"engine 'transformer' is none that loads this folder here.*transformers"
    ):
        verify(folder, CONFIG.model_copy(update={"engines": ("transformer",)}))
    chosen = verify(folder, CONFIG.model_copy(update={"engines": ()}))
    assert row(chosen).state == "not run" and not chosen.verified


def test_folders_that_are_no_exports_are_refused(toy_folder: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must be an export of quantlab: .* has no MANIFEST\.json"):
        verify(toy_folder, CONFIG)
    sealed(folder, {}).joinpath("recipe.json").unlink()
    with pytest.raises(CheckpointError, match=r"with recipe\.json and digests of its codes"):
        verify(sealed(folder), CONFIG)


def test_the_working_folder_is_not_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(OutputError, match=r"leave .* first"):
        verify(folder, VerifyConfig())


KILLED = """
import os, sys
from pathlib import Path
from quantlab.manifest import check_files
from quantlab.verify.certificate import Certificate
from quantlab.verify.codes import CodesReport
from quantlab.verify.size import SizeReport
from quantlab.verify.writing import write_certificate

assert "torch" not in sys.modules
folder, steps, states = Path(sys.argv[1]), 0, set()
manifest = check_files(folder)
certificate = Certificate("w4g32", "x", "0" * 64, 6, CodesReport(), SizeReport(0, 0, 0, 0.0), (), "", 0)
while True:
    child = os.fork()
    if child == 0:
        seen = 0
        def watch(event, arguments):
            global seen
            if event.startswith(("os.", "open", "shutil.", "ctypes.")) and event != "os.scandir":
                seen += 1
                if seen > steps:
                    os._exit(9)
        sys.addaudithook(watch)
        write_certificate(folder, certificate, manifest)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    check_files(folder)
    states.add((folder / "certificate.json").exists())
    if code == 0:
        break
    assert code == 9, code
    steps += 1
print(steps, sorted(states))
"""


def test_a_kill_at_any_step_leaves_a_true_folder(folder: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    steps, states = done.stdout.split(maxsplit=1)
    # Links or copies of eight files, three new ones, syncs, the exchange, and what is cleared away after it.
    assert int(steps) > 20 and states.strip() == "[False, True]"


def test_a_folder_that_changes_meanwhile_is_not_certified(folder: Path, engines: Any) -> None:
    engines(folder, f"open({str(folder / 'config.json')!r}, 'a').write(' ')")
    before = (folder / "MANIFEST.json").read_bytes()
    with pytest.raises(VerificationError, match="must not change while it is verified"):
        verify(folder, CONFIG)
    assert (folder / "MANIFEST.json").read_bytes() == before
    assert read_manifest(folder)["files"].keys().isdisjoint({"certificate.json"})
