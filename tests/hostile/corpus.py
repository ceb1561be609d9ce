"""The corpus: every bad file, by the classes B1-B30 of bad input that apply to loading.

    B1  pickle with os.system             B11 GGUF: counts, arrays, places      B22 chat template that runs code
    B2  pickle that needs globals         B12 shapes disagree with the config   B23 tokenizer past the embedding
    B3  stride-0 pickle                   B13 Inf scales, quantized checkpoint  B25 NaN and Inf
    B4  safetensors: length, text         B14 another architecture's config     B26 outliers past float16, zeros
    B5  overlap, hole, truncated          B15 diff model, odd heads, no lambda  B27 tied lm_head stored twice
    B6  a million tensors, wrapping       B16 run files                         B28 rows of HellaSwag
    B7  dtype unknown or below a byte     B17 JSON: deep, huge, not UTF-8       B29 records of other versions
    B8  index and what it points at       B18 archives                          B30 rings
    B9  config: sizes, nested code        B19 links, pipes, devices
    B10 auto_map and remote code          B20 names

Two classes do not apply to loading. B21, prompts that hold markup: they are data of a report, which escapes them; the
tests of reports hold them. B24, calibration sets that are empty or too small: nothing of them is in a file that is
loaded; the tests of calibration hold them.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from tests.hostile import config_files, export_files, gguf_files, index_files, own_files, safetensors_files
from tests.hostile.case import Case

NOT_LOADED = ("B21", "B24")
"""Classes that say nothing about loading."""
CLASSES = tuple(name for name in (f"B{number}" for number in range(1, 31)) if name not in NOT_LOADED)

_GROUPS = {
    "safetensors": safetensors_files,
    "folder": index_files,
    "config": config_files,
    "gguf": gguf_files,
    "ours": own_files,
    "export": export_files,
}

CASES: list[Case] = [
    replace(case, name=f"{group}: {case.name}") for group, files in _GROUPS.items() for case in files.CASES
]


def first_of_each(cases: Iterable[Case], count: int = 3) -> set[str]:
    """Names of the first cases of every class in every group, told before and by loading: those that always run."""
    seen: Counter[tuple[str, str, bool]] = Counter()
    kept = set()
    for case in cases:
        keys = [(case.name.split(":")[0], name, case.loads) for name in case.classes.split()]
        if any(seen[key] < count for key in keys):
            kept.add(case.name)
            seen.update(keys)
    return kept
