"""The other end of server.py: asks it to run command lines, and judges what came of them."""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tests

ROOT = Path(tests.__file__).parents[1]

SECONDS, MEMORY = 2.0, 512 << 20


@dataclass(frozen=True)
class Outcome:
    """What a child did; memory is what it took beyond what its server held, where torch was imported before."""

    code: int
    hung: bool
    seconds: float
    memory: int
    stdout: str
    stderr: str
    opened: list[str]
    ran: list[str]
    compiled: list[str]


class Server:
    """A running server.py."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.resident = self._answer()["resident"]

    def run(self, words: Sequence[str], *, torch: bool, seconds: float = 10.0) -> Outcome:
        """Run a command line; the limit is where it is killed, not where it is too slow."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"words": list(words), "seconds": seconds}) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        return Outcome(memory=answer.pop("peak") - (self.resident if torch else 0), **answer)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server ended"
        return dict(json.loads(line))


@contextmanager
def serving(warm: Sequence[str] = (), prefix: Sequence[str] = ()) -> Iterator[Server]:
    """A server; with words it imports torch first, by running them."""
    with tempfile.TemporaryFile("w+") as log:
        words = [*prefix, sys.executable, "-m", "tests.hostile.server", *(["--torch", *warm] if warm else [])]
        process = subprocess.Popen(
            words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            yield Server(process)
        finally:
            process.stdin.close()  # type: ignore[union-attr]
            # A busy machine takes its time to end a process that has imported torch.
            process.wait(300)
            process.stdout.close()  # type: ignore[union-attr]


def faults(outcome: Outcome, place: Path, bases: Path, says: str) -> list[str]:
    """What an outcome breaks of the promise, in words; empty for a clean refusal (or, without `says`, success)."""
    found = [f"executed: {ran}" for ran in outcome.ran]
    found += ["the canary is there"] * ((place / "canary").exists() or (place / "it/canary").exists())
    found += [f"compiled {name}" for name in outcome.compiled if str(place) in name or name == "<template>"]
    found += [f"opened {path}" for path in outcome.opened if not allowed(path, place, bases)]
    found += ["hung"] * outcome.hung
    found += [f"took {outcome.seconds:.1f} s"] * (outcome.seconds > SECONDS)
    found += [f"took {outcome.memory >> 20} MiB"] * (outcome.memory > MEMORY)
    found += ["traceback"] * ("Traceback" in outcome.stderr)
    found += [] if outcome.code == (2 if says else 0) else [f"exit code {outcome.code}"]
    lines = outcome.stderr.removesuffix("\n").splitlines()
    if says and not (len(lines) == 1 and lines[0].startswith("quantlab: ")):
        found.append(f"stderr is {outcome.stderr[:2000]!r}")
    elif says and not re.search(says, lines[0]):
        found.append(f"says {lines[0][:600]!r}")
    if says and not outcome.stderr.removesuffix("\n").isprintable():
        found.append("stderr holds control characters")
    if says and len(outcome.stderr) > 8192:
        found.append(f"says it in {len(outcome.stderr)} characters")
    return found


def allowed(path: str, place: Path, bases: Path) -> bool:
    """Whether a file may be opened: the checkpoint, what is written, Python's own files and the good ones."""
    there = Path(path).resolve()
    if there.is_relative_to(place / "outside"):
        return False
    roots = [place, bases, ROOT, *map(Path, {sys.prefix, sys.base_prefix, sys.exec_prefix})]
    system = (
        "/proc/self/",
        "/proc/cpuinfo",
        "/proc/meminfo",
        "/proc/stat",
        "/proc/mounts",
        "/proc/sys/kernel/",
        "/sys/",
        "/dev/null",
        "/dev/urandom",
        "/usr/share/zoneinfo",
    )
    # The folder itself is opened for a temporary file without a name.
    if there == Path(tempfile.gettempdir()).resolve():
        return True
    return any(there.is_relative_to(root.resolve()) for root in roots) or path.startswith(system)
