"""A process that has imported the command line and runs it in forked children, each under limits and watched.

    python -m tests.hostile.server [--torch WORDS...]

Reads one request a line, `{"words": [...], "seconds": s}`, and answers one line: exit code, stdout, stderr, seconds,
peak memory, and what the child's audit hook saw. Seconds are of the processor, since others share the machine; a child
that waits is killed when its time on the clock is over. With --torch the server first runs the command line on a good
checkpoint in its own process, so that children find everything imported that loading imports.

Audit hooks see what Python opens and runs. Files that native code opens (safetensors, tokenizers) they do not see.
"""

import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

from quantlab.cli import main

RUNS = {
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "os.fork", "os.forkpty", "pty.spawn",
    "subprocess.Popen", "pickle.find_class", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname",
    "socket.bind", "webbrowser.open",
}  # fmt: skip
"""Audit events of code that is run, and of connections."""
TORCH = 99
"""Exit code of a child that went on to load what it should have refused."""
ADDRESS_SPACE = 8 << 30
"""Bytes beyond what the server has mapped, so that a runaway child cannot take the machine with it."""


def watch(seen: dict[str, list[str]], *, torch: bool) -> None:
    """Note in `seen` what this process opens and runs from now on; end it where torch is imported and must not be."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "import" and arguments[0] == "torch" and not torch:
            sys.stderr.write("torch was imported\n")
            sys.stderr.flush()
            os._exit(TORCH)
        if event == "open" and isinstance(arguments[0], str | bytes):
            seen["opened"].append(os.fsdecode(arguments[0]))
        elif event in RUNS:
            seen["ran"].append(f"{event} {arguments!r}"[:200])
        elif event in ("exec", "compile"):
            name = getattr(arguments[0], "co_filename", None) if event == "exec" else arguments[1]
            seen["compiled"].append(os.fsdecode(name) if isinstance(name, str | bytes) else repr(name))

    sys.addaudithook(hook)


def run_child(words: list[str], folder: Path) -> None:
    """The command line, in the child; never returns."""
    for number, name in ((0, os.devnull), (1, folder / "stdout"), (2, folder / "stderr")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESS_SPACE,) * 2)
    code, seen = 1, {"opened": [], "ran": [], "compiled": []}
    with (folder / "seen").open("w") as file:
        watch(seen, torch="torch" in sys.modules)
        try:
            main(words)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        json.dump({name: list(dict.fromkeys(values)) for name, values in seen.items()}, file)
    os._exit(code)


def serve(words: list[str], seconds: float) -> dict[str, Any]:
    """Run the words in a child; killed after `seconds`."""
    with tempfile.TemporaryDirectory() as name:
        folder, begun = Path(name), time.perf_counter()
        child = os.fork()
        if child == 0:
            run_child(words, folder)
        waited, status, usage = wait(child, begun + seconds)
        told = (folder / "seen").read_text() if (folder / "seen").exists() else ""
        return {
            "code": os.waitstatus_to_exitcode(status),
            "hung": not waited,
            "seconds": usage.ru_utime + usage.ru_stime,
            "peak": usage.ru_maxrss * 1024,
            "stdout": (folder / "stdout").read_text(errors="replace"),
            "stderr": (folder / "stderr").read_text(errors="replace"),
            **(json.loads(told) if told else {"opened": [], "ran": [], "compiled": []}),
        }


def wait(child: int, end: float) -> tuple[bool, int, resource.struct_rusage]:
    """Whether the child ended by itself before `end`, its status and its usage."""
    while time.perf_counter() < end:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            return True, status, usage
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    return False, status, usage


def resident() -> int:
    """Bytes of memory that this process holds now, and a child at its start."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def prepare(words: list[str]) -> None:
    """Import what the verbs import before a checkpoint is opened; with words, run them once."""
    import matplotlib.font_manager  # noqa: F401  reads its cache

    import quantlab.pipeline
    import quantlab.progress
    import quantlab.tables
    import quantlab.verify.tables
    import quantlab.verify.verify
    import reports.page  # noqa: F401

    if not words:
        return
    out, sys.stdout = sys.stdout, sys.stderr
    try:
        main(words)
    except SystemExit as end:
        assert not end.code
    sys.stdout = out
    import quantlab.models.low_bit  # noqa: F401


if __name__ == "__main__":
    prepare(sys.argv[2:])
    assert ("torch" in sys.modules) == bool(sys.argv[2:])
    sys.stdout.write(json.dumps({"resident": resident()}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        request = json.loads(line)
        sys.stdout.write(json.dumps(serve(request["words"], request["seconds"])) + "\n")
        sys.stdout.flush()
