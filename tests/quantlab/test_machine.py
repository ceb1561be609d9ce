"""What the CPU is called and can do, as Linux tells it, and without Linux."""

from pathlib import Path

import pytest

from quantlab import machine

X86 = """processor\t: 0
model name\t: Some CPU 9000
flags\t\t: fpu sse4_1 avx avx2 fma f16c avx512f avx512_vnni avx512_vnni_x

processor\t: 1
model name\t: Another
flags\t\t: amx_int8
"""
ARM = """processor\t: 0
Features\t: fp asimd asimddp sve bf16
"""


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in machine.CPU_SETTINGS:
        monkeypatch.delenv(name, raising=False)


def tell(text: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(self: Path, **_: str) -> str:
        if text is None:
            raise FileNotFoundError(self)
        return text

    monkeypatch.setattr(Path, "read_text", read_text)


def test_the_first_processor_and_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    tell(X86, monkeypatch)
    sets = ["sse4_1", "avx", "f16c", "fma", "avx2", "avx512f", "avx512_vnni"]
    assert machine.cpu() == {"name": "Some CPU 9000", "instruction_sets": sets}
    assert machine.cpu_line() == "Some CPU 9000 (sse4_1, avx, f16c, fma, avx2, avx512f, avx512_vnni)"


def test_settings_stand_beside_what_the_cpu_can(monkeypatch: pytest.MonkeyPatch) -> None:
    tell(X86, monkeypatch)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert machine.cpu()["settings"] == {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert machine.cpu_line().endswith("avx512_vnni; ONEDNN_MAX_CPU_ISA=AVX2)")


def test_a_cpu_that_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    tell(ARM, monkeypatch)
    assert machine.cpu_line() == "aarch64 (asimd, asimddp, sve, bf16)"
    tell(None, monkeypatch)
    assert machine.cpu() == {"name": "aarch64", "instruction_sets": []} and machine.cpu_line() == "aarch64"
