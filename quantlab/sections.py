"""Sections: frozen models of a YAML file's parts, and how a mapping with overrides becomes one.

Unknown keys are errors that name the nearest known key; the first fault of a validation is one sentence with its place.
"""

import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from quantlab.errors import ConfigError, nearest

__all__ = ["AnySection", "Section", "build_section", "merged", "read_yaml"]


MAX_BYTES, MAX_NODES = 1_000_000, 100_000
"""Of a YAML file, and of what it holds once its aliases are followed."""


class Section(BaseModel):
    """A frozen section that forbids unknown keys and documents every field by the string below it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


AnySection = TypeVar("AnySection", bound=Section)
"""A section of any kind: a run, a training."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ConfigError: not a regular text file of at most MAX_BYTES, not YAML, a key that stands twice, or aliases that
            make more than MAX_NODES of it.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"config file must be a regular file: {path} is a folder, pipe or device.")
        if status.st_size > MAX_BYTES:
            raise ConfigError(
                f"config file must hold at most {MAX_BYTES} bytes: {path} holds {status.st_size}."
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"config file must be readable text: {path}: {error}.") from error
    try:
        tree = _parsed(text, path)
    except yaml.YAMLError as error:
        raise ConfigError(f"config file must be YAML: {path}: {' '.join(str(error).split())}.") from error
    # ValueError: a date or a number that matches its pattern and is none.
    except (RecursionError, ValueError) as error:
        raise ConfigError(
            f"config file must be YAML that is not nested hundreds deep: {path}: {error}."
        ) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"config file must hold a mapping of sections: {path} holds {type(tree).__name__}.")
    return tree


def _parsed(text: str, path: Path) -> Any:
    """The tree of a YAML text, whose aliases are counted before they are followed."""
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        if _num_nodes(root, {}, path) > MAX_NODES:
            raise ConfigError(
                f"config file must be small: the aliases of {path} make more than {MAX_NODES} values."
            )
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _num_nodes(node: yaml.Node, known: dict[int, int | None], path: Path) -> int:
    """Nodes below a node, each alias counted as what it stands for."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise ConfigError(f"config file must not hold an alias of itself: {path} does.")
        return count
    known[id(node)] = None
    children = node.value
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted(key for key, count in Counter(keys).items() if count > 1):
            raise ConfigError(f"config file must name a key once: {path} has {twice[0]!r} twice.")
        children = [child for pair in node.value for child in pair]
    known[id(node)] = count = 1 + sum(_num_nodes(child, known, path) for child in children)
    return count


def build_section(
    root: type[AnySection], tree: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "options"
) -> AnySection:
    """Validate a mapping as a section of any kind after merging `section.key=value` overrides into it.

    Raises:
        ConfigError: an unknown key (the nearest known one is named), a value out of range.
    """
    merged: dict[str, Any] = _copy(tree)
    for override in overrides:
        _apply(merged, override)
    try:
        return root.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_one_sentence(error, where, root)) from error


def merged(tree: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options over a tree, section by section; an empty section of options changes nothing."""
    result = dict(tree)
    for key, value in options.items():
        if not isinstance(value, Mapping):
            result[key] = value
        elif value:
            below = result.get(key)
            result[key] = merged(below if isinstance(below, Mapping) else {}, value)
    return result


def _copy(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {str(key): _copy(value) for key, value in tree.items()}
    return [_copy(value) for value in tree] if isinstance(tree, list | tuple) else tree


def _apply(tree: dict[str, Any], override: str) -> None:
    """Merge one `section.key=value`; the value is read as YAML, and `checkpoints.dtype` reaches every checkpoint."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"--set takes section.key=value, found {override!r}.")
    *sections, key = dotted.replace("-", "_").split(".")
    nodes: list[Any] = [tree]
    for section in sections:
        nodes = [child for node in nodes for child in _children(node, section, dotted)]
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {dotted} takes a YAML value, found {text!r}.") from error
    for node in nodes:
        if not isinstance(node, dict):
            raise ConfigError(f"--set {dotted} names no key: {'.'.join(sections)} holds a plain value.")
        node[key] = value


def _children(node: Any, section: str, dotted: str) -> list[Any]:
    if not isinstance(node, dict):
        raise ConfigError(f"--set {dotted} names no key: {section!r} is inside a plain value.")
    child = node.get(section)
    if child is None:
        child = node[section] = {}
    return child if isinstance(child, list) else [child]


def _one_sentence(error: ValidationError, where: str, root: type[Section]) -> str:
    """The first fault of a validation, with its place and, for an unknown key, the nearest known one."""
    fault = error.errors()[0]
    place = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        section = _section_at(fault["loc"][:-1], root)
        known = list(section.model_fields)
        hint = nearest(str(fault["loc"][-1]), known) or f" Known keys: {', '.join(known)}."
        return f"unknown key {place!r} in {where}.{hint}"
    if fault["type"] == "missing":
        return f"key {place!r} is missing in {where}."
    message = fault["msg"].removeprefix("Value error, ").rstrip(".")
    return f"{place or 'configuration'} in {where}: {message}; found {fault['input']!r}."


def _section_at(location: Sequence[int | str], root: type[Section]) -> type[Section]:
    """The section class at a location below `root` such as ("checkpoints", 0) or ("profile", "text")."""
    section = root
    for part in location:
        if isinstance(part, str) and part in section.model_fields:
            section = _section_in(section.model_fields[part].annotation) or section
    return section


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    found = (_section_in(argument) for argument in getattr(annotation, "__args__", ()))
    return next((section for section in found if section), None)
