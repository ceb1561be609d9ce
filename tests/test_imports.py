"""The direction of imports, and what each room may pull in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CLI = ROOT / "quantlab" / "cli"
MAY_IMPORT = {
    "probes": {"probes"},
    "quantlab": {"quantlab", "probes"},
    "reports": {"reports", "quantlab.records", "quantlab.statistics", "quantlab.schemes", "quantlab.errors"},
}
TORCH_FREE = [
    "probes.errors",
    "probes.catalogue",
    "quantlab.errors",
    "quantlab.config",
    "quantlab.schemes",
    "quantlab.records",
    "quantlab.statistics",
    "quantlab.cli",
    "quantlab.checks",
    "quantlab.pipeline",
    "quantlab.tables",
    "quantlab.progress",
    "quantlab.inspection.checkpoint",
    "quantlab.inspection.families",
    "quantlab.data.hellaswag",
    "quantlab.export.formats",
    "quantlab.export.model_card",
    "quantlab.export.cell",
    "quantlab.manifest",
    "quantlab.reading.raw",
    "quantlab.reading.readers",
    "quantlab.reading.compressed_tensors",
    "quantlab.reading.gguf",
    "quantlab.reading.quantlab_format",
    "quantlab.bench.bench",
    "quantlab.sweep.plan",
    "quantlab.sweep.store",
    "quantlab.sweep.executors",
    "reports.page",
]


def _imported(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _allowed(name: str, package: str) -> bool:
    return any(name == target or name.startswith(f"{target}.") for target in MAY_IMPORT[package])


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_one_way(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        if path.is_relative_to(CLI):
            continue  # the one place that joins all three
        ours = {name for name in _imported(path) if name.split(".")[0] in MAY_IMPORT}
        wrong = {name for name in ours if not _allowed(name, package)}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_only_python_m_quantlab_imports_the_command_line() -> None:
    files = [path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py")]
    outside = [path for path in files if not path.is_relative_to(CLI)]
    users = [path for path in outside if any(name.startswith("quantlab.cli") for name in _imported(path))]
    assert users == [ROOT / "quantlab" / "__main__.py"]


def test_the_rule_would_catch_a_wrong_import() -> None:
    assert not _allowed("quantlab.schemes.Scheme", "probes")
    assert not _allowed("quantlab.pipeline", "reports")


def test_modules_that_need_no_torch_import_none() -> None:
    code = f"import importlib, sys\nfor name in {TORCH_FREE!r}:\n    importlib.import_module(name)\n"
    code += "heavy = {'torch', 'transformers'} & set(sys.modules)\nassert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_importing_a_package_imports_nothing_heavy(package: str) -> None:
    code = (
        f"import sys, {package}\nheavy = {{'torch', 'transformers', 'numpy', 'pandas'}} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code + "assert not heavy, heavy"], cwd=ROOT, check=True)


def test_decoders_import_nothing_of_the_writers() -> None:
    """The reading side shares no code with the writing one, so that a mistake in one is not repeated in the other."""
    writing = ("quantlab.export.", "quantlab.methods.", "torch.", "transformers.")
    files = sorted((ROOT / "quantlab" / "reading").rglob("*.py"))
    assert len(files) > 10
    for path in files:
        wrong = {name for name in _imported(path) if f"{name}.".startswith(writing)}
        assert not wrong, f"{path.name} imports {sorted(wrong)}"
