"""What a run planned: cells that are not there, and which checkpoints it declares matched.

run.json holds the configuration and the keys of its records in the order of the plan. A record by itself names its
checkpoint but not the path that the configuration gives it, so the plan's order joins the two where it fits.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from reports.scheme_names import BASELINE

if TYPE_CHECKING:
    from reports.load import Cell

_UNKNOWN = ("", ("unknown", "unknown checkpoint", "unknown"))


@dataclass(frozen=True)
class Hole:
    """A planned cell without a record; what it would be is "unknown" where the plan's order does not tell."""

    key: str
    kind: str
    checkpoint: str
    scheme: str


@dataclass(frozen=True)
class Pairing:
    """Labels of the checkpoints that the run declares matched; all its others are references."""

    baseline: str
    variants: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The baseline and the variants."""
        return (self.baseline, *self.variants)


def holes(plan: Mapping[str, Any], cells: Sequence["Cell"]) -> tuple[Hole, ...]:
    """Planned keys without a record, with the checkpoint and scheme that stand at their place in the plan."""
    known = {cell.record.key: cell for cell in cells}
    places = _places(plan, known)
    return tuple(
        Hole(key, *place) for key, place in zip(plan["records"], places, strict=True) if key not in known
    )


def pairing(plan: Mapping[str, Any] | None, cells: Sequence["Cell"]) -> Pairing | None:
    """The declared comparison: run.json's, or without one that of all records that declare any, if they agree.

    Records of one scheme in several settings, in a folder without run.json, are not paired: which belong together is
    not told.
    """
    configs = [plan.get("config") or {}] if plan else [cell.record.config for cell in cells]
    declared = [config["compare"] for config in configs if config.get("compare")]
    if not declared or any(each != declared[0] for each in declared):
        return None
    scored = Counter((cell.checkpoint, cell.scheme) for cell in cells if cell.record.kind == "evaluation")
    if plan is None and max(scored.values(), default=0) > 1:
        return None
    labels = _labels_of_paths(plan, cells)
    label = {path: labels.get(path, path) for path in (declared[0]["baseline"], *declared[0]["against"])}
    return Pairing(label[declared[0]["baseline"]], tuple(label[path] for path in declared[0]["against"]))


def _labels_of_paths(plan: Mapping[str, Any] | None, cells: Sequence["Cell"]) -> dict[str, str]:
    """Path of a checkpoint, as configurations write it -> its label.

    From the plan's order where it fits the records, else from the path's last part where only one path ends in it and
    only one label has that name.
    """
    known = {cell.record.key: cell for cell in cells}
    configs = [plan.get("config") or {}] if plan else [cell.record.config for cell in cells]
    paths = [str(each.get("path")) for config in configs for each in config.get("checkpoints") or []]
    names: dict[str, set[str]] = {}
    for cell in cells:
        names.setdefault(str((cell.record.made_by.get("checkpoint") or {}).get("name")), set()).add(
            cell.checkpoint
        )
    shared = Counter(map(_last_part, set(paths)))
    found = {path: names.get(_last_part(path), set()) for path in paths if shared[_last_part(path)] == 1}
    labels = {path: next(iter(of)) for path, of in found.items() if len(of) == 1}
    if plan:
        labels |= {path: label for path, label in _planned_labels(plan, known).items() if label != path}
    return labels


def _last_part(path: str) -> str:
    return PurePosixPath(path).name.removesuffix(".gguf")


def _planned_labels(plan: Mapping[str, Any], known: Mapping[str, "Cell"]) -> dict[str, str]:
    """Path -> label of the checkpoint whose records stand at its place in the plan; nothing where orders differ."""
    return {path: label for path, (kind, label, _) in _paths_and_places(plan, known) if kind != "unknown"}


def _places(plan: Mapping[str, Any], known: Mapping[str, "Cell"]) -> list[tuple[str, str, str]]:
    """(kind, checkpoint, scheme) of every planned key; of unknown kind where the plan's order does not tell."""
    return [place for _, place in _paths_and_places(plan, known)]


def _paths_and_places(
    plan: Mapping[str, Any], known: Mapping[str, "Cell"]
) -> list[tuple[str, tuple[str, str, str]]]:
    """The checkpoint's path and (kind, checkpoint, scheme) of every planned key, from the plan's order: checkpoint by
    checkpoint, each with its profile and then its schemes. Where it does not fit the records, keys stay nameless."""
    config, keys = plan.get("config") or {}, list(plan["records"])
    places: list[tuple[str, tuple[str, str, str]]] = []
    for checkpoint in config.get("checkpoints") or []:
        path, each = str(checkpoint.get("path")), _cells_of(checkpoint, config)
        own = keys[len(places) : len(places) + len(each)]
        label = next((known[key].checkpoint for key in own if key in known), path)
        places += [(path, (kind, label, scheme)) for kind, scheme in each]
    fits = len(places) == len(keys) and all(
        (known[key].record.kind, known[key].checkpoint, known[key].scheme) == place
        for key, (_, place) in zip(keys, places, strict=True)
        if key in known
    )
    return places if fits else [_UNKNOWN] * len(keys)


def _cells_of(checkpoint: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(kind, scheme) of the cells that a run plans for one checkpoint, in order."""
    schemes = checkpoint.get("schemes") or config.get("schemes") or []
    profile = [("profile", BASELINE)] if config.get("profile") else []
    return profile + [("evaluation", scheme) for scheme in schemes if config.get("evaluation")]
