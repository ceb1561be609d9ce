"""The command lines that open a case: a verb, and what it needs besides."""

from pathlib import Path

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


def words_of(verb: str, path: Path | str, bases: Path, work: Path) -> list[str]:
    """The command line that opens `path`; it writes to `work` only."""
    text = bases / "text.txt"
    if not text.exists():
        text.write_text(TEXT)
    block = ["--sequence-length", "16", "--num-sequences", "1", "--device", "cpu", "--out", str(work / "run")]
    profile = ["--text", str(text), *block]
    good = str(bases / "llama")
    return {
        "profile": ["profile", str(path), *profile],
        "profile16": ["profile", str(path), *profile, "--dtype", "float16"],
        "evaluate": ["evaluate", str(path), "--tasks", "perplexity", *profile],
        "verify": ["verify", str(path)],
        "text": ["profile", good, "--text", str(path), *block],
        "hellaswag": ["evaluate", good, "--tasks", "hellaswag", "--hellaswag", str(path), *block[4:]],
        "run": ["run", str(path), "--out", str(work / "run")],
        "report": ["report", str(path)],
    }[verb]
