"""The code's version covers every source."""

from pathlib import Path

import quantlab
from quantlab.records import source_hash, sources

ROOT = Path(quantlab.__file__).parents[1]


def test_source_hash_is_of_names_and_contents(tmp_path):
    assert source_hash() == source_hash() and len(source_hash()) == 64
    seen = set()
    for name, content in [("a.py", "x = 1"), ("a.py", "x = 2"), ("b.py", "x = 2"), ("c.txt", "y")]:
        (tmp_path / "probes").mkdir(exist_ok=True)
        (tmp_path / "probes" / name).write_text(content)
        seen.add(sources.tree_hash(tmp_path, ("probes", "quantlab")))
    assert len(seen) == 3  # the text file is no source


def test_every_source_of_both_packages_is_in_it(monkeypatch):
    read = []

    def noted(path):
        read.append(path.relative_to(ROOT).as_posix())
        return b""

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", noted)
        source_hash.__wrapped__()
    packages = ("probes", "quantlab")
    assert read == sorted(read) and set(read) == {
        path.relative_to(ROOT).as_posix() for package in packages for path in (ROOT / package).rglob("*.py")
    }
    decide = (
        "quantize",
        "solving",
        "calibration/collect",
        "methods/gptq",
        "transforms/apply",
        "layers/linear",
    )
    for name in decide:
        assert any(path.startswith(f"quantlab/{name}") for path in read), name
