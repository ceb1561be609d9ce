"""Exported toy folders, copies of them with one thing wrong, and engines that answer whatever a test wants."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from quantlab.config import CheckpointConfig, HellaSwagConfig
from quantlab.export.folder import export_checkpoint
from quantlab.manifest import read_manifest, write_manifest
from quantlab.models.loading import load_checkpoint
from quantlab.schemes import Scheme
from quantlab.verify.config import VerifyConfig
from quantlab.verify.questions import Request, make_request
from quantlab.verify.simulated import forward_of, load_simulated
from quantlab.verify.sources import source_of

CONFIG = VerifyConfig(hellaswag=HellaSwagConfig(limit=2), timeout_s=600, probe_tokens=16)
LINEAR = "model.layers.1.mlp.up_proj"


def exported(source: Path, out: Path, scheme: str = "w4g32", format_name: str = "compressed-tensors") -> Path:
    """An export of the checkpoint."""
    checkpoint = load_checkpoint(CheckpointConfig(path=str(source), device="cpu"))
    export_checkpoint(checkpoint, Scheme.parse(scheme), format_name, out)
    return out


def sealed(folder: Path, tensors: Mapping[str, Any] | None = None) -> Path:
    """The folder with a manifest that lists it as it is now, as someone would write it who wants to hide a change."""
    facts = {"tensors": read_manifest(folder)["tensors"] if tensors is None else tensors}
    write_manifest(folder, facts)
    return folder


def tampered(folder: Path, out: Path, change: Callable[[dict[str, NDArray[Any]]], object]) -> Path:
    """A copy whose tensors were changed, and whose manifest agrees."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return sealed(out)


def changed_json(file: Path, **changes: Any) -> None:
    """Set entries of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def request_of(folder: Path, config: VerifyConfig = CONFIG) -> Request:
    """What an engine will be asked about the folder."""
    ours = load_simulated(folder, source_of(folder))
    return make_request(ours.tokenizer, config, ours.info.vocab_size)


ENGINE = """
import hashlib
from pathlib import Path

import numpy as np


def VERSIONS():
    return {{"fake": "1.0"}}


def load(folder):
    answers = np.load(Path(__file__).with_name("answers.npz"))

    def forward(ids):
        key = hashlib.sha256(str(ids).encode()).hexdigest()
        logits, hidden = answers[key + " logits"].copy(), list(answers[key + " hidden"])
        {change}
        return logits, hidden

    return forward
"""


def fake_engine(room: Path, folder: Path, change: str = "", config: VerifyConfig = CONFIG) -> Path:
    """A folder of engines whose `transformers` knows our model's answers by heart, and then does `change`."""
    room.mkdir(parents=True, exist_ok=True)
    model = load_simulated(folder, source_of(folder)).model
    forward, request, answers = forward_of(model), request_of(folder, config), {}
    for ids in [*(row[:-1].tolist() for row in request.rows), *(row.tolist() for row in request.probes)]:
        logits, hidden = forward(ids)
        key = hashlib.sha256(str(ids).encode()).hexdigest()
        answers |= {f"{key} logits": logits, f"{key} hidden": np.array(hidden)}
    np.savez(room / "answers.npz", **answers)
    (room / "transformers.py").write_text(ENGINE.format(change=change or "pass"))
    return room
