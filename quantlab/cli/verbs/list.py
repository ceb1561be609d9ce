"""`quantlab list`: the names that other verbs take, each with its line."""

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated

import typer

from quantlab.cli import options
from quantlab.cli.printing import show


class Topic(StrEnum):
    """What `quantlab list` lists; `LINES` says where it is told."""

    schemes = "schemes"
    methods = "methods"
    transforms = "transforms"
    formats = "formats"
    statistics = "statistics"
    variants = "variants"


def list_(topic: Annotated[Topic, typer.Argument(help="What to list.")], json_: options.Json = False) -> None:
    """What there is, one line each."""
    from quantlab import tables

    lines = LINES[topic]()
    show(json_, lines, lambda: tables.listing(topic.value, lines))


def _schemes() -> dict[str, str]:
    from quantlab.schemes import catalogue
    from quantlab.schemes.places import explained

    return catalogue.SCHEMES | explained() | catalogue.explained()


def _methods() -> dict[str, str]:
    from quantlab.schemes.catalogue import METHODS

    return {name: method.summary for name, method in METHODS.items()}


def _transforms() -> dict[str, str]:
    from quantlab.schemes.catalogue import TRANSFORMS

    return {name: transform.summary for name, transform in TRANSFORMS.items()}


def _formats() -> dict[str, str]:
    from quantlab.export.formats import FORMATS

    return {name: form.description for name, form in FORMATS.items()}


def _statistics() -> dict[str, str]:
    from probes.catalogue import STATISTICS

    return STATISTICS


def _variants() -> dict[str, str]:
    from quantlab.attention.variants import VARIANTS

    return {name: variant.summary for name, variant in VARIANTS.items()}


LINES: dict[Topic, Callable[[], dict[str, str]]] = {
    Topic.schemes: _schemes,
    Topic.methods: _methods,
    Topic.transforms: _transforms,
    Topic.formats: _formats,
    Topic.statistics: _statistics,
    Topic.variants: _variants,
}
