"""The README's commands and its Python example run as they stand, on a toy model in the place of the hub's."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.toys import save_checkpoint

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_ID = "HuggingFaceTB/SmolLM2-135M"
COMMANDS = re.findall(r"^quantlab .+$", README, flags=re.MULTILINE)
LONG = [line for line in COMMANDS if line.split()[1] in ("run", "train")]
"""What takes minutes or a user's texts; that the files they name load is the configs' own test."""
EXAMPLE = "\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with a toy model whose sizes take groups of 64."""
    folder = tmp_path_factory.mktemp("readme")
    save_checkpoint("llama", folder / HUB_ID, intermediate_size=128)
    return folder


def _run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_there_is_something_to_run() -> None:
    assert {line.split()[1] for line in COMMANDS} == {
        "profile",
        "evaluate",
        "sweep",
        "report",
        "quantize",
        "verify",
        "bench",
        "export",
        "list",
        "calibrate",
        "allocate",
        "convert",
        "run",
        "train",
    }
    assert LONG and all((ROOT / line.split()[2]).exists() for line in LONG)


@pytest.mark.parametrize(
    "line", [line for line in COMMANDS if line not in LONG], ids=lambda line: line.split()[1]
)
def test_command_runs(line: str, workplace: Path) -> None:
    done = _run(["-m", "quantlab", *line.split()[1:]], workplace)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and "Traceback" not in done.stderr


def test_example_gives_the_numbers_of_the_command(tmp_path: Path) -> None:
    """Of a checkpoint in bfloat16, which both compute in float32: one default decides on scales."""
    save_checkpoint("llama", tmp_path / HUB_ID, intermediate_size=128, gain=3.0, dtype="bfloat16")
    done = _run(["-c", f"MODEL = {HUB_ID!r}\n{EXAMPLE}"], tmp_path)
    assert done.returncode == 0, done.stderr
    top1, scored = done.stdout.splitlines()
    found = {}
    for verb, options in (
        ("profile", ["--num-sequences", "2"]),
        ("evaluate", ["--scheme", "w4g64", "--limit", "16", "--tasks", "hellaswag"]),
    ):
        command = _run(["-m", "quantlab", verb, HUB_ID, *options, "--json", "--out", "run"], tmp_path)
        assert command.returncode == 0, command.stderr
        found[verb] = json.loads(command.stdout)
    assert float(top1) == found["profile"]["attention_logits"]["top1"]
    assert float(scored.rpartition(" ")[2]) == found["evaluate"]["hellaswag"]["margin"]


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links), links
