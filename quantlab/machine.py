"""The CPU that numbers were made on: its name, its instruction sets, and settings that keep libraries from them.

Scores depend on it in their last digits, speeds in their first. No torch.
"""

import os
import platform
import re
from pathlib import Path
from typing import Any

__all__ = ["CPU_SETTINGS", "cpu", "cpu_line"]

INSTRUCTION_SETS = (
    # x86
    *(
        "sse4_1",
        "avx",
        "f16c",
        "fma",
        "avx2",
        "avx_vnni",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
    ),
    *("amx_int8", "amx_bf16"),
    # Arm
    *("asimd", "asimddp", "sve", "sve2", "i8mm", "bf16"),
)
"""Those that kernels of torch, oneDNN, MKL and llama.cpp are chosen by, as Linux names them."""

CPU_SETTINGS = (
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA"),
    *("MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "OPENBLAS_CORETYPE"),
)
"""Variables of the environment by which libraries choose others."""


def cpu() -> dict[str, Any]:
    """`name`, `instruction_sets` and, where the environment has any, `settings`."""
    told = _cpuinfo()
    found = set((told.get("flags") or told.get("features") or "").split())
    settings = {name: os.environ[name] for name in CPU_SETTINGS if name in os.environ}
    return {
        "name": told.get("model name") or platform.processor() or platform.machine(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in found],
        **({"settings": settings} if settings else {}),
    }


def cpu_line() -> str:
    """The same for people: `AMD EPYC (fma, avx2; ONEDNN_MAX_CPU_ISA=AVX2)`."""
    told = cpu()
    settings = [f"{name}={value}" for name, value in told.get("settings", {}).items()]
    inside = "; ".join(filter(None, (", ".join(told["instruction_sets"]), ", ".join(settings))))
    return f"{told['name']} ({inside})" if inside else str(told["name"])


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in re.split(r"\n\s*\n", text.strip())[0].splitlines())
    return {name.strip().lower(): value.strip() for name, _, value in pairs}
