"""bench: tokens counted exactly, verdicts by their intervals, and an engine that fails costs only itself."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from quantlab.bench import bench as room
from quantlab.bench import engines, process, worker
from quantlab.bench.bench import bench
from quantlab.bench.config import BenchConfig
from quantlab.bench.engines import gguf_file, reads
from quantlab.bench.process import EngineError, run_once
from quantlab.bench.results import BenchResult, Ratio, Run, Side, compare
from quantlab.bench.tables import bench_table
from quantlab.errors import CheckpointError, ConfigError
from quantlab.machine import cpu_line

MEGABYTE = 10**6


def run_of(prefill: float = 100.0, decode: float = 10.0, megabytes: int = 50) -> Run:
    """A run at these rates, with 300 MB of libraries."""
    return Run(8, 5, 1.0, 8 / prefill, 4 / decode, (300 + megabytes) * MEGABYTE, 300 * MEGABYTE)


def side_of(name: str, *runs: Run) -> Side:
    return Side(name, "bfloat16", runs, (("torch", "2"),))


def shown(result: BenchResult) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(bench_table(result))
    return captured.get()


def answers(
    rates: dict[str, list[float]], asked: list[str]
) -> Callable[[str, Path, BenchConfig], tuple[Run, dict[str, str], str]]:
    """A stand-in for processes: each engine's decode rates in turn; an engine without any fails."""

    def run_one(engine: str, path: Path, config: BenchConfig) -> tuple[Run, dict[str, str], str]:
        asked.append(engine)
        if engine not in rates:
            raise EngineError("it ended with code 1: it needs another library.")
        return run_of(decode=rates[engine].pop(0)), {"torch": "2"}, "bfloat16"

    return run_one


def test_a_fresh_process_counts_every_token(toy_folder: Path) -> None:
    run, versions, arithmetic = run_once(
        "transformers", toy_folder, BenchConfig(prompt_tokens=7, new_tokens=5)
    )
    assert (run.prompt_tokens, run.new_tokens) == (7, 5)
    assert 0 < run.first_token_s < run.load_s and run.decode_s > 0
    # Python with torch holds over 100 MB, and a toy model is far below it.
    assert 100 * MEGABYTE < run.libraries_bytes < run.peak_bytes < 3000 * MEGABYTE
    assert set(versions) == {"torch", "transformers"} and arithmetic == "bfloat16"


@pytest.mark.parametrize(("num_prompt", "num_new"), [(1, 2), (9, 4)])
def test_what_the_engine_read_is_what_was_asked(
    num_prompt: int, num_new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counting:
        num_entries, arithmetic = 11, "none"

        def __init__(self) -> None:
            self.read: list[list[int]] = []

        def start(self, ids: list[int]) -> None:
            self.read = [list(ids)]

        def step(self, token: int) -> None:
            self.read.append([token])

        def num_read(self) -> int:
            return sum(map(len, self.read))

    engine = Counting()
    monkeypatch.setitem(worker.LOADERS, "transformers", lambda path, room, threads: engine)
    request = {
        "engine": "transformers",
        "path": "",
        "prompt_tokens": num_prompt,
        "new_tokens": num_new,
        "threads": 1,
    }
    run = Run(**worker.measure(request | {"clock": "cpu"})["run"])
    assert (run.prompt_tokens, run.new_tokens) == (num_prompt, num_new)
    assert [len(ids) for ids in engine.read] == [num_prompt] + [1] * (num_new - 1)
    assert all(0 <= token < 11 for ids in engine.read for token in ids)


def test_rates_are_tokens_over_seconds() -> None:
    run = Run(128, 32, 1.0, 0.5, 3.1, 700, 300)
    assert (run.prefill_rate, run.decode_rate, run.model_bytes) == (256.0, 10.0, 400)


def test_a_ratio_is_that_of_repeats_side_by_side() -> None:
    """A machine that is twice as slow in the second repeat changes nothing."""
    ratio = Ratio.of([6.0, 3.0, 4.5, 6.0, 3.0], [3.0, 1.5, 2.25, 3.0, 1.5])
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))
    spread = Ratio.of([1.0, 4.0, 1.0, 4.0, 2.0], [1.0] * 5)
    # The logs have mean log 2 and standard error log(2) / sqrt(5); Student's quantile of 4 degrees is 2.776.
    assert spread.value == pytest.approx(2.0)
    assert spread.high == pytest.approx(2.0 ** (1 + 2.7764 / 5**0.5), rel=1e-4)


def test_too_few_repeats_have_no_interval() -> None:
    """Two once gave "0.64 [0.00, 230.64] times"."""
    sides = [
        side_of(name, *[run_of(decode=rate) for rate in (10.0, 30.0)]) for name in ("quantlab", "parent")
    ]
    found = compare(*sides)
    assert found.verdict == "simulated" and "new tokens 1.00 [too few repeats] times" in found.sentence


@pytest.mark.parametrize(
    ("decode", "prefill", "megabytes", "verdict", "said"),
    [
        (
            (30.0, 33.0, 31.0, 33.0, 31.0),
            (100.0, 99.0, 101.0, 99.0, 101.0),
            50,
            "faster",
            "faster here at new tokens (",
        ),
        (
            (10.0, 9.9, 10.1, 9.9, 10.1),
            (150.0, 149.0, 151.0, 149.0, 151.0),
            50,
            "faster",
            "faster here at prompts (",
        ),
        (
            (30.0, 33.0, 31.0, 33.0, 31.0),
            (150.0, 149.0, 151.0, 149.0, 151.0),
            50,
            "faster",
            "at new tokens and prompts (",
        ),
        # 30 times as fast once and no faster at other times is a spread, not a speed.
        (
            (300.0, 10.0, 10.0, 10.0, 10.0),
            (100.0, 99.0, 101.0, 99.0, 101.0),
            50,
            "simulated",
            "neither faster nor smaller in memory",
        ),
        ((10.0, 9.9, 10.1, 9.9, 10.1), (100.0, 99.0, 101.0, 99.0, 101.0), 20, "smaller", "only smaller here"),
        ((5.0, 5.1, 4.9, 5.1, 4.9), (50.0, 50.0, 51.0, 50.0, 51.0), 80, "simulated", "neither"),
    ],
)
def test_the_verdict_is_that_of_the_interval(
    decode: tuple[float, ...], prefill: tuple[float, ...], megabytes: int, verdict: str, said: str
) -> None:
    parent = side_of("parent", *[run_of()] * 5)
    runs = [run_of(p, d, megabytes) for p, d in zip(prefill, decode, strict=True)]
    found = compare(side_of("quantlab", *runs), parent)
    assert found.verdict == verdict and said in found.sentence


def test_sides_take_turns_and_one_that_fails_does_not_stop_the_others(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    ended = []
    rates = {"parent": [10.0, 10.0, 10.1, 10.0, 10.0], "transformers": [30.0, 30.1, 30.2, 30.1, 30.1]}
    monkeypatch.setattr(room, "run_once", answers(rates, asked))
    config = BenchConfig(parent=toy_folder, engines=("quantlab", "transformers"))
    result = bench(toy_folder, config, ended.append)
    turns = ["parent", "transformers"]
    assert asked == ["parent", "quantlab", "transformers", *reversed(turns), *turns, *reversed(turns), *turns]
    assert sum(ended) == 15
    quantlab, transformers = result.sides
    assert quantlab.error and not quantlab.runs and len(transformers.runs) == 5
    assert [one.verdict for one in result.comparisons] == ["faster"]
    text = shown(result)
    assert "quantlab did not run: it ended with code 1: it needs another library." in text
    assert "transformers is faster here at new tokens (new tokens 3.00 [" in text
    assert "30.1 [30.0, 30.2]" in text
    assert f"clock wall, on {cpu_line()}" in " ".join(text.split())
    summary = json.loads(json.dumps(result.summary(), allow_nan=False))
    assert summary["engines"][0]["error"] and summary["cpu"] == cpu_line()


def test_a_folder_without_its_parent_is_measured_alone(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alone(folder: Path) -> BenchResult:
        monkeypatch.setattr(room, "run_once", answers({"transformers": [10.0] * 2}, []))
        return bench(folder, BenchConfig(engines=("transformers",), repeats=2))

    result = alone(toy_folder)
    assert result.parent is None and result.comparisons == ()
    assert result.notes == ("The folder names no parent (recipe.json): it was measured alone. Use --parent.",)
    folder = shutil.copytree(toy_folder, tmp_path / "copy")
    recipe = folder / "recipe.json"
    for body in ("{", "[]", '{"source": {}}', '{"source": {"name": 5}}'):
        recipe.write_text(body)
        assert "names no parent" in alone(folder).notes[0]
    recipe.write_text('{"source": {"name": "nowhere-1b"}}')
    assert alone(folder).notes == (
        "Its parent nowhere-1b is not on this machine: it was measured alone. Use --parent.",
    )
    assert "measured alone" in shown(alone(folder))


def test_the_parent_that_the_recipe_names_is_found_and_may_fail(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(toy_folder, tmp_path / "copy")
    (folder / "recipe.json").write_text(json.dumps({"source": {"name": str(toy_folder)}}))
    rates = {"parent": [10.0] * 2, "transformers": [10.0] * 2}
    monkeypatch.setattr(room, "run_once", answers(rates, []))
    config = BenchConfig(engines=("transformers",), repeats=2)
    result = bench(folder, config)
    assert result.parent is not None and result.parent_name == str(toy_folder)
    assert result.parent_weights_bytes == result.weights_bytes > 0
    monkeypatch.setattr(room, "run_once", answers({"transformers": [10.0] * 2}, []))
    result = bench(folder, config)
    assert result.comparisons == () and "did not run, so nothing is compared: it ended" in result.notes[0]


def test_what_cannot_be_benched_is_refused(toy_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="needs a folder with weights in safetensors or GGUF: found none in"
    ):
        bench(tmp_path, BenchConfig())
    with pytest.raises(ConfigError, match=r"engine llama_cpp must be installed and read this kind of file"):
        bench(toy_folder, BenchConfig(engines=("llama_cpp",)))
    with pytest.raises(CheckpointError, match="checkpoint not found"):
        bench(toy_folder, BenchConfig(parent=tmp_path / "gone"))


def test_an_engine_that_cannot_load_says_so_in_a_sentence(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(toy_folder, tmp_path / "copy")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nothing"}))
    with pytest.raises(EngineError, match=r"^ValueError: .*`nothing`"):
        run_once("transformers", folder, BenchConfig(prompt_tokens=2, new_tokens=2))
    monkeypatch.setattr(process.sys, "executable", shutil.which("false"))
    with pytest.raises(EngineError, match=r"^it ended with code 1: it wrote nothing"):
        run_once("transformers", folder, BenchConfig())
    monkeypatch.undo()
    with pytest.raises(EngineError, match=r"it took more than 0.01 s"):
        run_once("transformers", folder, BenchConfig(timeout_s=0.01))


@pytest.mark.slow
def test_a_toy_folder_from_end_to_end(toy_folder: Path) -> None:
    config = BenchConfig(
        parent=toy_folder, engines=("transformers",), prompt_tokens=8, new_tokens=4, repeats=2
    )
    result = bench(toy_folder, config)
    assert result.parent is not None and not result.notes
    for side in (result.parent, *result.sides):
        assert not side.error and len(side.runs) == 2
        assert all((run.prompt_tokens, run.new_tokens) == (8, 4) for run in side.runs)
    json.dumps(result.summary(), allow_nan=False)
    assert "transformers is " in shown(result)


def test_a_gguf_file_is_found_by_itself_and_in_a_folder(tmp_path: Path) -> None:
    one, other = tmp_path / "b.gguf", tmp_path / "weights.safetensors"
    assert gguf_file(tmp_path) is None
    one.write_bytes(b""), other.write_bytes(b"")
    assert gguf_file(one) == one and gguf_file(other) is None and gguf_file(tmp_path) == one
    (tmp_path / "a.gguf").write_bytes(b"")
    assert gguf_file(tmp_path) == tmp_path / "a.gguf"


@pytest.mark.parametrize("installed", [True, False])
def test_which_engine_reads_which_files(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: object() if installed else None)
    safetensors, gguf = tmp_path / "folder", tmp_path / "gguf"
    for folder, name in ((safetensors, "model.safetensors"), (gguf, "model.gguf")):
        folder.mkdir()
        (folder / name).write_bytes(b"")
    assert [reads(name, safetensors) for name in ("transformers", "quantlab", "llama_cpp")] == [
        True,
        True,
        False,
    ]
    assert [reads(name, gguf) for name in ("transformers", "quantlab", "llama_cpp")] == [
        True,
        False,
        installed,
    ]
