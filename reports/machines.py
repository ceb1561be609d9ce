"""What computed a record, as its sidecar tells it: all that can move a score, and nothing that only moves time."""

from collections.abc import Mapping
from typing import Any

__all__ = ["machine_of"]


def machine_of(sidecar: Mapping[str, Any]) -> str:
    """`AMD EPYC (fma, avx2; torch AVX2)`; empty where the sidecar names no CPU."""
    cpu = sidecar.get("cpu")
    if not isinstance(cpu, Mapping) or not cpu.get("name"):
        return ""
    settings = [f"{name}={value}" for name, value in (cpu.get("settings") or {}).items()]
    without = [] if cpu.get("onednn", True) else ["without oneDNN"]
    parts = (
        ", ".join(map(str, cpu.get("instruction_sets") or [])),
        f"torch {cpu['torch']}" if cpu.get("torch") else "",
        ", ".join([*settings, *without]),
    )
    inside = "; ".join(filter(None, parts))
    place = f"{sidecar['gpu']}, " if sidecar.get("gpu") else ""
    return f"{place}{cpu['name']} ({inside})" if inside else f"{place}{cpu['name']}"
