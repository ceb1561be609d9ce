"""bench: a folder's engines and its 16-bit parent, in turn, each time in a fresh process. No torch in this one."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

from quantlab.bench.config import BenchConfig, EngineName
from quantlab.bench.engines import reads
from quantlab.bench.process import EngineError, run_once
from quantlab.bench.results import BenchResult, Side
from quantlab.errors import CheckpointError, ConfigError
from quantlab.inspection.resolving import resolve
from quantlab.machine import cpu_line

__all__ = ["bench"]

_WEIGHTS = (".safetensors", ".gguf")


def bench(
    folder: Path, config: BenchConfig, advance: Callable[[int], object] = lambda count: None
) -> BenchResult:
    """Measure prompts, new tokens and memory of a folder, against its parent where there is one.

    Args:
        folder: a folder of weights in low bits, or a `.gguf` file.
        advance: called with the number of processes that ended since the last call; there are at most
            `repeats` times (engines + 1).

    An engine that fails is named with its reason, and the others go on.

    Raises:
        CheckpointError: there is no such folder, or it holds no weights; or the parent that was named is not there.
        ConfigError: an engine was named that does not read this kind of file, or is not installed.
    """
    if not _weight_files(folder):
        raise CheckpointError(
            f"bench needs a folder with weights in safetensors or GGUF: found none in {folder}."
        )
    engines = _engines(folder, config)
    parent, name, notes = _parent(folder, config)
    paths = ({} if parent is None else {"parent": parent}) | dict.fromkeys(engines, folder)
    sides = _measured(paths, config, advance)
    ran = sides.pop("parent", None)
    if ran is not None and ran.error:
        notes += (f"The parent {name} did not run, so nothing is compared: {ran.error}",)
    return BenchResult(
        folder=folder.resolve().name,
        weights_bytes=_size(folder),
        sides=tuple(sides.values()),
        parent=ran,
        parent_name=name,
        parent_weights_bytes=0 if parent is None else _size(parent),
        notes=notes,
        settings=tuple(
            (field, getattr(config, field))
            for field in ("prompt_tokens", "new_tokens", "repeats", "threads", "clock")
        ),
        cpu=cpu_line(),
    )


def _measured(
    paths: dict[str, Path], config: BenchConfig, advance: Callable[[int], object]
) -> dict[str, Side]:
    """Every side, in turn, forwards and backwards; one that fails once is not run again."""
    sides = {name: Side(name, "") for name in paths}
    for repeat in range(config.repeats):
        for name in list(paths)[:: -1 if repeat % 2 else 1]:
            side = sides[name]
            if not side.error:
                try:
                    run, versions, arithmetic = run_once(name, paths[name], config)
                    sides[name] = Side(name, arithmetic, (*side.runs, run), tuple(versions.items()))
                except EngineError as error:
                    sides[name] = replace(side, runs=(), error=str(error))
            advance(1)
    return sides


def _engines(folder: Path, config: BenchConfig) -> tuple[EngineName, ...]:
    """The engines to run: those named, or every one that reads this kind of file."""
    able = tuple(name for name in get_args(EngineName) if reads(name, folder))
    for name in config.engines:
        if name not in able:
            raise ConfigError(
                f"engine {name} must be installed and read this kind of file: {folder.name} is for "
                f"{', '.join(able)}. Use one of them."
            )
    return config.engines or able


def _parent(folder: Path, config: BenchConfig) -> tuple[Path | None, str, tuple[str, ...]]:
    """Where the 16-bit checkpoint is, its name, and what is to be said where it is nowhere."""
    if config.parent is not None:
        path = resolve(str(config.parent))
        return path, path.resolve().name, ()
    recipe = folder / "recipe.json"
    try:
        name = json.loads(recipe.read_text(encoding="utf-8"))["source"]["name"]
        assert isinstance(name, str)
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        return None, "", ("The folder names no parent (recipe.json): it was measured alone. Use --parent.",)
    try:
        return resolve(name), name, ()
    except CheckpointError:
        return (
            None,
            name,
            (f"Its parent {name} is not on this machine: it was measured alone. Use --parent.",),
        )


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix in _WEIGHTS else []
    return sorted(file for file in path.glob("*") if file.suffix in _WEIGHTS)


def _size(path: Path) -> int:
    """Bytes of the weight files."""
    return sum(file.stat().st_size for file in _weight_files(path))
