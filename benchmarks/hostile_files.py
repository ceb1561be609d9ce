"""The hostile corpus through quantlab and the readers beside it: who refuses, who breaks, who hangs, who loads.

    python benchmarks/hostile_files.py [--only TOOL] [--every N]

Every file is opened in a forked child of this process, which has imported all of them, so that a child's seconds and
memory are the reader's own: at most 2 seconds of processor (and 10 on the clock for what sleeps then), 512 MiB more
than this process holds. Each tool is given the bad files that it reads, as a careful user would: transformers with
safetensors only and no remote code, safetensors by safe_open and every tensor, gguf-py by GGUFReader.
Prints a Markdown table; good controls are left out.
"""

import argparse
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import gguf
import torch
import transformers
from safetensors import SafetensorError, safe_open

from quantlab.cli import main
from tests.hostile.bases import make_bases
from tests.hostile.case import WEIGHTS, Case
from tests.hostile.corpus import CASES
from tests.hostile.verbs import words_of

SECONDS, CLOCK, MEMORY = 2, 10, 512 << 20
CLEAN = (SafetensorError, OSError, ValueError)
"""Errors that these libraries raise on purpose; KeyError, ZeroDivisionError and their like are met by accident."""
COLUMNS = ("refused cleanly", "wrong error or crash", "hung or over limits", "loaded silently", "code ran")


def _transformers(path: Path) -> None:
    options = {"local_files_only": True, "trust_remote_code": False}
    transformers.AutoTokenizer.from_pretrained(path, **options)
    transformers.AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, **options)


def _transformers_gguf(path: Path) -> None:
    transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)


def _safetensors(path: Path) -> None:
    with safe_open(path / WEIGHTS, "pt") as file:
        for name in file.keys():  # noqa: SIM118  no mapping
            file.get_tensor(name)


def _gguf(path: Path) -> None:
    gguf.GGUFReader(path)


READERS: dict[str, Callable[[Path], None]] = {
    "safetensors": _safetensors,
    "gguf": _gguf,
    "transformers": _transformers,
    "transformers-gguf": _transformers_gguf,
}


def reads(tool: str, case: Case) -> bool:
    """Whether a case is a file of the tool's."""
    if case.good:
        return False
    return tool == "quantlab" or (tool in case.tools and (case.base != "empty" or "gguf" in tool))


def child(tool: str, case: Case, path: Path | str, bases: Path, place: Path) -> int:
    """Open a file; 0 loaded, 2 refused, 3 another end."""
    for number in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + 1, SECONDS + 2))
    try:
        if tool == "quantlab":
            main(words_of(case.verb, path, bases, place / "work"))
        READERS[tool](Path(path))
    except SystemExit as end:
        return end.code if end.code in (0, 2) else 3
    except RuntimeError as error:
        # How transformers says that shapes do not fit; what is derived from it is met by accident.
        return 2 if type(error) is RuntimeError else 3
    except CLEAN:
        return 2
    except BaseException:
        return 3
    return 0


def sleeps(process: int) -> bool:
    """Whether a process waits for something else than a processor, which others may have."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "SD"


def verdict(tool: str, case: Case, bases: Path, place: Path) -> str:
    """The column that a file belongs in."""
    path = case.make(bases, place)
    begun, held = time.perf_counter(), int(Path("/proc/self/statm").read_text().split()[1])
    process = os.fork()
    if process == 0:
        os._exit(child(tool, case, path, bases, place))
    ended = 0
    while not ended and (time.perf_counter() < begun + CLOCK or not sleeps(process)):
        ended, status, usage = os.wait4(process, os.WNOHANG)
        time.sleep(0.002)
    if not ended:
        os.kill(process, signal.SIGKILL)
        _, status, usage = os.wait4(process, 0)
    if (place / "canary").exists() or (place / "it/canary").exists():
        return COLUMNS[4]
    over = usage.ru_maxrss * 1024 - held * resource.getpagesize() > MEMORY
    if not ended or over or usage.ru_utime + usage.ru_stime > SECONDS:
        return COLUMNS[2]
    return {0: COLUMNS[3], 2: COLUMNS[0]}.get(os.waitstatus_to_exitcode(status), COLUMNS[1])


def tally(tool: str, bases: Path, folder: Path, every: int) -> Counter[str]:
    """Files by verdict, of each `every` one; what is not refused cleanly is named on stderr."""
    counts: Counter[str] = Counter()
    for number, case in enumerate([case for case in CASES if reads(tool, case)][::every]):
        place = folder / f"{tool}-{number}"
        place.mkdir()
        found = verdict(tool, case, bases, place)
        counts[found] += 1
        if found != COLUMNS[0]:
            sys.stderr.write(f"{tool}: {found}: {case.name} ({case.classes})\n")
    return counts


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["quantlab", *READERS])
    parser.add_argument("--every", type=int, default=1, help="open each N-th file of a tool")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        bases = make_bases(folder / "bases")
        # Once in this process, so that no child pays for imports.
        import quantlab.models.low_bit
        import quantlab.verify.verify  # noqa: F401

        _transformers(bases / "llama")
        _transformers_gguf(bases / "gguf/toy.gguf")
        out, sys.stdout = sys.stdout, sys.stderr
        try:
            main(words_of("profile", bases / "llama", bases, folder / "warm"))
        except SystemExit as end:
            assert not end.code
        sys.stdout = out
        sys.stdout.write(f"| reader | files | {' | '.join(COLUMNS)} |\n|---{'|---' * (len(COLUMNS) + 1)}|\n")
        for tool in [given.only] if given.only else ["quantlab", *READERS]:
            counts = tally(tool, bases, folder, given.every)
            cells = [tool, counts.total(), *(counts[column] for column in COLUMNS)]
            sys.stdout.write(f"| {' | '.join(map(str, cells))} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    run()
