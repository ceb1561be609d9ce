"""The code's version covers every source."""

from pathlib import Path

import pytest

import quantlab
from quantlab.records import reachable_hash, source_hash, sources

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


SOURCES = {
    "quantlab/__init__.py": "",
    "quantlab/entry.py": "def run():\n    from quantlab.late import f\n",
    "quantlab/late/__init__.py": "from .deep import g\nimport probes.eye",
    "quantlab/late/deep.py": "import quantlab.entry",  # a circle ends
    "quantlab/named/__init__.py": "",
    "quantlab/named/reader.py": "from importlib import import_module",
    "quantlab/named/found.py": "",
    "quantlab/user.py": "import quantlab.entry\nimport quantlab.named.reader",
    "quantlab/other.py": "",
    "probes/__init__.py": "",
    "probes/eye.py": "import os, torch",
}


@pytest.mark.parametrize(
    ("changed", "moves"),
    [
        ("quantlab/__init__.py", {"entry", "user"}),
        ("quantlab/entry.py", {"entry", "user"}),
        ("quantlab/late/__init__.py", {"entry", "user"}),
        ("quantlab/late/deep.py", {"entry", "user"}),
        ("probes/eye.py", {"entry", "user"}),
        ("quantlab/named/found.py", {"user"}),
        ("quantlab/user.py", {"user"}),
        ("quantlab/other.py", set()),
    ],
)
def test_a_reachable_source_that_changes_changes_the_hash(tmp_path, changed, moves):
    for name, text in SOURCES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def hashes():
        reachable_hash.cache_clear()
        return {name: reachable_hash(f"quantlab.{name}", root=tmp_path) for name in ("entry", "user")}

    before = hashes()
    assert hashes() == before
    (tmp_path / changed).write_text(SOURCES[changed] + "\nx = 1\n")
    assert {name for name, value in hashes().items() if value != before[name]} == moves


def test_all_that_a_run_can_reach_is_in_the_hash_of_records():
    """Records, solutions and sensitivities carry `source_hash`, which is of whole packages."""
    hashed = {path for package in sources._PACKAGES for path in (ROOT / package).rglob("*.py")}
    reached = sources.reachable(["quantlab.pipeline"])
    assert reached <= hashed and ROOT / "quantlab" / "methods" / "gptq.py" in reached
