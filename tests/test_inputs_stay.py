"""What a key was made of is what is read: inputs that change after it are refused, and nothing is recorded."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantlab import checks, pipeline
from quantlab.config import CheckpointConfig, RunConfig, build_config
from quantlab.errors import CheckpointError, UserError
from quantlab.evaluation.tasks import TASKS
from quantlab.inspection.checkpoint import content_hash, inspect_checkpoint
from quantlab.manifest import MANIFEST, write_manifest
from quantlab.models.loading import load_checkpoint
from quantlab.sweep.jobs import jobs_of

ROW = (
    '{"activity_label": "Work", "ctx_a": "A man sits.", "ctx_b": "he", "endings": ["a b", "c d", "e f", "g h"], '
    '"label": 1}\n'
)


@pytest.fixture
def place(tmp_path: Path, toy_folder: Path) -> Path:
    """A checkpoint and data of its own, to be changed."""
    shutil.copytree(toy_folder, tmp_path / "model")
    (tmp_path / "text.txt").write_text("Some words that make a text. " * 60)
    (tmp_path / "held_out.txt").write_text("Other words, for other ends. " * 60)
    (tmp_path / "rows.jsonl").write_text(ROW * 3)
    return tmp_path


def _config(place: Path, **changes: Any) -> RunConfig:
    text = {"sequence_length": 16, "num_sequences": 2}
    tree: dict[str, Any] = {
        "checkpoints": [{"path": str(place / "model"), "schemes": ["w4g32-gptq"]}],
        "profile": None,
        "evaluation": {
            "hellaswag": {"path": str(place / "rows.jsonl")},
            "perplexity": text | {"path": str(place / "text.txt")},
        },
        "calibration": {"text": text | {"path": str(place / "held_out.txt")}, "cache": str(place / "cache")},
        "out": str(place / "run"),
    }
    return build_config(tree | changes)


def _flip(file: Path) -> None:
    """Another byte at the end, of a file that looks as it did: same size, same time of its last write."""
    status, content = file.stat(), bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def _append(file: Path) -> None:
    file.write_text(file.read_text() + "\n " if file.suffix == ".json" else file.read_text() + "More. ")


CHANGES: dict[str, Callable[[Path], None]] = {
    "weights": lambda place: _flip(place / "model" / "model.safetensors"),
    "config": lambda place: _append(place / "model" / "config.json"),
    "tokenizer": lambda place: _append(place / "model" / "tokenizer.json"),
    "a new file": lambda place: (place / "model" / "added_tokens.json").write_text("{}") and None,
    "a file that is gone": lambda place: (place / "model" / "tokenizer_config.json").unlink(),
    "text": lambda place: _append(place / "text.txt"),
    "calibration": lambda place: _append(place / "held_out.txt"),
    "documents": lambda place: (place / "rows.jsonl").write_text(ROW * 4) and None,
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_after_the_key_is_refused(what: str, place: Path) -> None:
    """Before anything is loaded, by what travels to a worker process."""
    config = _config(place)
    job = jobs_of(config, *checks.check(config))[-1]
    assert job.cell.scheme == "w4g32-gptq"
    CHANGES[what](place)
    with pytest.raises(UserError, match="must stay as it is"):
        pipeline.run_job(pickle.loads(pickle.dumps(job)), lambda units: None)
    assert not list((place / "run").rglob("*.parquet")) and not (place / "cache").exists()


@pytest.mark.parametrize("what", ["weights", "text"])
def test_what_changes_while_a_cell_is_computed_is_not_recorded(
    what: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = TASKS["perplexity"]

    def meanwhile(*arguments: Any) -> Any:
        CHANGES[what](place)
        return score(*arguments)

    monkeypatch.setitem(TASKS, "perplexity", meanwhile)
    config = _config(place, checkpoints=[{"path": str(place / "model")}])
    with pytest.raises(UserError, match="must stay as it is"):
        pipeline.run(config, lambda cells: lambda event: None)
    assert not list((place / "run" / "records").iterdir())


def test_a_file_that_was_only_touched_is_the_same(place: Path) -> None:
    config = _config(place, checkpoints=[{"path": str(place / "model")}])

    def touch(cells: Any) -> Callable[[Any], None]:
        for file in (place / "model").iterdir():
            file.touch()
        return lambda event: None

    assert len(pipeline.run(config, touch)) == 1


@pytest.mark.slow
def test_workers_refuse_too(place: Path) -> None:
    config = _config(place, sweep={"workers": 2})

    def change(cells: Any) -> Callable[[Any], None]:
        CHANGES["weights"](place)
        return lambda event: None

    with pytest.raises(CheckpointError, match="must stay as it is"):
        pipeline.run(config, change)
    assert not list((place / "run" / "records").iterdir())


def test_what_is_loaded_is_what_is_hashed(place: Path) -> None:
    config = CheckpointConfig(path=str(place / "model"))
    checkpoint = load_checkpoint(config)
    assert checkpoint.content_hash() == content_hash(inspect_checkpoint(config))
    _flip(place / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match="written after it was loaded"):
        checkpoint.content_hash()


# ---- folders with a manifest


def test_a_folder_is_what_its_manifest_says(place: Path) -> None:
    """Files that decide a score, that is: a card may be edited and a distributor adds files of its own."""
    folder = place / "model"
    write_manifest(folder)
    (folder / "README.md").write_text("# A card of my own")
    (folder / ".gitattributes").write_text("")
    checks.check(_config(place))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("weights", "was changed"),
        ("config", "was changed"),
        ("a new file", "does not list"),
        ("a file that is gone", "lacks a file"),
    ],
)
def test_a_folder_that_is_not_what_its_manifest_says_is_refused(what: str, words: str, place: Path) -> None:
    write_manifest(place / "model")
    CHANGES[what](place)
    with pytest.raises(CheckpointError, match=words):
        checks.check(_config(place))


def test_another_tools_manifest_is_its_own_matter(place: Path) -> None:
    (place / "model" / MANIFEST).write_text('{"entries": []}')
    checks.check(_config(place))
