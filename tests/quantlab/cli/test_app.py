"""The verbs as one command, and its exit codes."""

from pathlib import Path

import pytest

from quantlab.cli import main
from quantlab.cli.app import VERBS
from tests.quantlab.cli.command import ROOT, children_cpu_s, process, quantlab


def test_help_answers_in_half_a_second() -> None:
    before = children_cpu_s()
    done = process("--help", capture_output=True)
    cpu_s = children_cpu_s() - before
    assert done.returncode == 0 and cpu_s < 0.5, f"answered after {cpu_s:.2f} s"


def test_a_verb_is_a_file_of_its_name() -> None:
    files = {path.stem for path in (ROOT / "quantlab" / "cli" / "verbs").glob("[!_]*.py")}
    assert files == set(VERBS)


def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = quantlab(capsys, "evaluate")
    assert code == 2 and "MODEL" in err
    code, _, err = quantlab(capsys, "evalute")
    assert code == 2 and "evalute" in err


def test_interruption_is_exit_code_130(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantlab import pipeline

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupt)
    code, _, err = quantlab(capsys, "evaluate", toy_folder, "--out", tmp_path / "run")
    assert code == 130 and "goes on from there" in err


def test_a_bug_of_ours_keeps_its_traceback(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantlab import pipeline

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr(pipeline, "run", fail)
    with pytest.raises(AssertionError, match="ours"):
        main(["evaluate", str(toy_folder), "--out", str(tmp_path / "run")])
