"""What a check says of a text, from statistics whose answer is known."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlab.calibration.check import Adequacy, InputCheck, check_text_of, compare, top_eigenvalues
from quantlab.calibration.overlap import LENGTH, ngrams, overlaps, share_in
from quantlab.calibration.statistics import LinearStats
from quantlab.errors import CalibrationError
from tests import toys


def _stats(x_MI: torch.Tensor) -> LinearStats:
    return LinearStats(x_MI.T @ x_MI, x_MI.amin(0), x_MI.amax(0), x_MI.mean(0), len(x_MI))


def _normal(rows: int, channels: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))


GOOD = InputCheck("layer.0.q", 4096, 64, 0, 0.95, 0.9, 0.01, 0.05)


def _found(**changes: Any) -> Adequacy:
    return Adequacy((InputCheck(**(vars(GOOD) | changes)),), {"WikiText-2 test": 0.0})


def test_equal_halves_differ_in_nothing() -> None:
    stats = _stats(_normal(500, 32, seed=0))
    found = compare("x", stats, stats)
    assert (found.absmax_ratio, found.top_overlap, found.num_dead) == (1.0, 1.0, 0)
    assert found.trace_difference == found.eigenvalue_difference == 0.0
    assert found.num_tokens == 1000 and found.in_features == 32


def test_a_half_of_twice_the_size_shows_in_every_measure() -> None:
    x_MI = _normal(500, 32, seed=0)
    found = compare("x", _stats(x_MI), _stats(2 * x_MI))
    assert found.absmax_ratio == pytest.approx(0.5)
    # squares are 4 times as large: (4 - 1) / 2.5
    assert found.trace_difference == pytest.approx(1.2) and found.eigenvalue_difference == pytest.approx(1.2)
    assert found.top_overlap == 1.0


def test_other_largest_channels_show() -> None:
    x_MI = _normal(500, 40, seed=0)
    first, second = x_MI.clone(), x_MI.clone()
    first[:, :10] *= 100
    second[:, 5:15] *= 100
    assert compare("x", _stats(first), _stats(second)).top_overlap == 0.5


def test_dead_channels_are_those_dead_in_both_halves() -> None:
    first, second = _normal(50, 8, seed=0), _normal(50, 8, seed=1)
    first[:, :3] = 0
    second[:, 2:5] = 0
    assert compare("x", _stats(first), _stats(second)).num_dead == 1


def test_top_eigenvalues_are_those_of_the_full_decomposition() -> None:
    x_MI = _normal(400, 96, seed=3) * torch.linspace(3, 0.1, 96)
    gram = x_MI.T @ x_MI
    expected = torch.linalg.eigvalsh(gram.double()).flip(0)[:10]
    torch.testing.assert_close(top_eigenvalues(gram), expected, rtol=0.02, atol=0)


def test_a_good_text_is_enough() -> None:
    assert _found().verdict.startswith("enough: ") and _found().verdict.count(".") == 1
    assert json.loads(json.dumps(_found().summary()))["enough"] is True


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_tokens": 0}, "no token reaches 1 linears, the first is layer.0.q"),
        (
            {"num_tokens": 63},
            "63 tokens are fewer than the 64 inputs of layer.0.q, so its X^T X has no full rank",
        ),
        ({"num_dead": 4}, "4 of the 64 inputs of layer.0.q are always zero"),
        ({"absmax_ratio": 0.8}, "ranges of the two halves agree to a factor of 0.80 only"),
        ({"top_overlap": 0.6}, "the two halves share 60% of the largest channels only"),
        ({"trace_difference": 0.11}, "the energy of the two halves differs by 11%"),
        ({"eigenvalue_difference": 0.3}, "the spectra of the two halves differ by 30%"),
    ],
)
def test_each_fault_is_the_reason(changes: dict[str, Any], reason: str) -> None:
    found = _found(**changes)
    assert found.verdict == f"add text: {reason}." and found.reasons == [reason]
    assert not found.summary()["enough"]


def test_limits_themselves_pass() -> None:
    at_limit = {
        "absmax_ratio": 0.84,
        "top_overlap": 0.7,
        "trace_difference": 0.1,
        "eigenvalue_difference": 0.2,
    }
    assert not _found(**at_limit, num_tokens=64, num_dead=3).reasons


def test_text_that_models_are_scored_on_is_told() -> None:
    found = Adequacy((GOOD,), {"HellaSwag validation": 0.02})
    assert found.reasons == [
        "2.0% of its 13-grams occur in HellaSwag validation, which models are scored on: take another text"
    ]


def test_ngrams_are_runs_of_words() -> None:
    words = [f"w{number}" for number in range(LENGTH + 1)]
    found = list(ngrams(" ,".join(words).upper()))
    assert found == [" ".join(words[:-1]), " ".join(words[1:])]
    assert not list(ngrams(" ".join(words[: LENGTH - 1])))


def test_shares_count_distinct_ngrams() -> None:
    assert share_in({"a", "b"}, []) == 0.0 and share_in(set(), ["x"]) == 0.0
    text = " ".join(str(number) for number in range(LENGTH + 3))
    held = set(ngrams(text))
    assert share_in(held, [text, text]) == 1.0
    assert share_in(held, [text.rpartition(" ")[0]]) == 3 / 4


def test_evaluation_data_overlaps_with_itself() -> None:
    from quantlab.data.hellaswag import load_documents
    from quantlab.data.sources import shipped

    document = load_documents()[7]
    wiki = max(shipped("wiki.test.raw.xz").decode("utf-8").splitlines(), key=len)
    assert overlaps([f"{document.query} {document.endings[2]}"])["HellaSwag validation"] == 1.0
    assert overlaps([wiki])["WikiText-2 test"] == 1.0
    assert set(
        overlaps(["Nothing of this sentence was ever part of either of the two data sets, I hope."]).values()
    ) == {0.0}


def test_a_toy_model_is_checked_in_one_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    import quantlab.calibration.check as check

    monkeypatch.setattr(check, "overlaps", lambda texts: {"texts": float(len(texts))})
    counts: list[int] = []
    ids_NT = torch.randint(0, toys.NUM_TOKENS, (5, 16), generator=torch.Generator().manual_seed(0))
    found = check_text_of(toys.toy_model(), ids_NT, toys.toy_tokenizer(), batch_size=2, advance=counts.append)
    assert counts == [2, 1, 2] * 2
    assert [each.name.removeprefix("model.layers.") for each in found.inputs] == [
        f"{layer}.{name}"
        for layer in (0, 1)
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    ]
    assert all(each.num_tokens == 80 for each in found.inputs)
    assert found.overlap == {"texts": 5.0}
    assert "80 tokens are fewer than the 96 inputs of model.layers.0.mlp.down_proj" in found.verdict


def test_one_sequence_has_no_halves() -> None:
    with pytest.raises(CalibrationError, match=r"two halves of a text: found 1 sequence\. Give at least 2"):
        check_text_of(toys.toy_model(), torch.zeros(1, 8, dtype=torch.long), toys.toy_tokenizer())


def test_the_verb_stores_and_checks(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import quantlab.calibration.check as check
    from quantlab.cli import main

    monkeypatch.setattr(check, "overlaps", lambda texts: {"somewhere": 0.0})
    asked = ["calibrate", str(toy_folder), "--num-sequences", "4", "--sequence-length", "16", "--set"]
    asked.append(f"calibration.cache={tmp_path}")
    results = []
    for more in ([], ["--stream"], ["--check"]):
        with pytest.raises(SystemExit) as end:
            main([*asked, *more, "--json"])
        captured = capsys.readouterr()
        assert end.value.code == 0, captured.err
        results.append(json.loads(captured.out))
    stored, streamed, checked = results
    assert stored["linears"] == 14 and stored["attention_layers"] == 2 and stored["num_tokens"] == 64
    assert len(stored["notes"]) == 1 and stored["notes"][0].startswith(
        "2 linears saw fewer tokens than they have"
    )
    assert streamed["streamed"] and streamed["calibration"] == stored["calibration"]
    assert Path(stored["calibration"]).is_dir() and stored["bytes"] > 0
    assert checked["verdict"].startswith("add text: 64 tokens are fewer than the 96 inputs of model.layers.")
    for more in ([], ["--check"]):
        with pytest.raises(SystemExit):
            main([*asked, *more])
        out = capsys.readouterr().out
        assert (stored["calibration"] in out) if not more else (checked["verdict"][:40] in out)


def test_sequences_are_dealt_to_the_halves_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text whose second half differs from its first is no unstable one."""
    monkeypatch.setattr("quantlab.calibration.check.overlaps", lambda texts: {})
    a, b = (
        torch.randint(0, toys.NUM_TOKENS, (1, 16), generator=torch.Generator().manual_seed(n)) for n in (0, 1)
    )
    for rows, alike in (([a, a, b, b], True), ([a, b, a, b], False)):
        found = check_text_of(toys.toy_model(), torch.cat(rows), toys.toy_tokenizer(), batch_size=4)
        assert all((each.absmax_ratio > 0.999) == alike for each in found.inputs)
        assert all((each.trace_difference < 1e-4) == alike for each in found.inputs)
