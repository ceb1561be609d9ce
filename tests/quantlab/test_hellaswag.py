"""HellaSwag's scores: from log-likelihoods to predictions, margins, summaries and columns."""

import json
from pathlib import Path

import numpy as np
import pytest

from quantlab.config import HellaSwagConfig
from quantlab.data.hellaswag import Document
from quantlab.errors import DataError, EvaluationError
from quantlab.evaluation.hellaswag import HellaSwagScores, evaluate_hellaswag
from tests.toys import toy_model, toy_tokenizer


def scores(ll: list[list[float]], chars: list[list[int]], labels: list[int]) -> HellaSwagScores:
    documents = tuple(
        Document(10 + place, "query", tuple("x" * count for count in row), label)
        for place, (row, label) in enumerate(zip(chars, labels, strict=True))
    )
    tokens = np.array([[2, 3, 4, 5]] * len(ll))
    return HellaSwagScores(
        documents, np.array(ll), tokens, "auto: none", "asked for", "context", "0" * 64, "toy"
    )


SCORES = scores(
    ll=[[-4.0, -6.0, -9.0, -8.0], [-5.0, -5.0, -7.0, -9.0], [-3.0, -2.0, -4.0, -8.0]],
    chars=[[2, 6, 9, 4], [5, 5, 10, 3], [1, 1, 4, 2]],
    labels=[0, 1, 2],
)


def test_predictions_follow_the_definitions_and_ties_go_to_the_first() -> None:
    items = SCORES.items()
    assert items["item"].tolist() == [10, 11, 12]
    assert items["prediction"].tolist() == [0, 0, 1]
    assert items["prediction_norm"].tolist() == [1, 2, 2]
    assert items["correct"].tolist() == [True, False, False]
    assert items["correct_norm"].tolist() == [False, False, True]
    assert items["margin"].tolist() == [2.0, 0.0, -2.0]
    np.testing.assert_allclose(items["margin_norm"], [-2 + 1, -1 + 0.7, -1 + 2])
    assert items["ll_1"].tolist() == [-6.0, -5.0, -2.0]
    assert items["chars_2"].tolist() == [9, 10, 4] and items["tokens_3"].tolist() == [5, 5, 5]
    assert {len(column) for column in items.values()} == {3}


def test_the_summary_holds_every_score_with_its_interval() -> None:
    summary = SCORES.summary()
    assert (
        summary["n"] == 3 and summary["num_fewshot"] == 0 and summary["acc_norm_normaliser"] == "characters"
    )
    assert summary["acc"] == summary["acc_norm"] == pytest.approx(1 / 3)
    assert summary["margin"] == 0.0
    assert summary["nats_per_token"] == pytest.approx((4 + 5 + 4) / (2 + 3 + 4))
    enough = scores(
        ll=[[-4.0, -6.0, -9.0, -8.0], [-5.0, -5.0, -7.0, -9.0], [-3.0, -2.0, -4.0, -8.0]] * 2,
        chars=[[2, 6, 9, 4], [5, 5, 10, 3], [1, 1, 4, 2]] * 2,
        labels=[0, 1, 2] * 2,
    ).summary()
    for name in ("acc", "acc_norm", "margin", "margin_norm", "nats_per_token"):
        low, high = enough[f"{name}_interval"]
        assert low < enough[name] < high and enough[f"{name}_stderr"] > 0
        assert enough[name] == pytest.approx(summary[name]) and summary[f"{name}_interval"] == [None, None]
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_one_document_is_scored_and_its_spread_is_unknown() -> None:
    summary = scores([[-1.0, -2.0, -3.0, -4.0]], [[1, 1, 1, 1]], [0]).summary()
    assert summary["acc"] == 1.0 and summary["margin_stderr"] is None
    json.dumps(summary, allow_nan=False)


def test_documents_are_scored_where_they_stand_in_the_file() -> None:
    model, tokenizer = toy_model("llama", gain=3.0), toy_tokenizer()
    done: list[int] = []
    few = evaluate_hellaswag(
        model, tokenizer, HellaSwagConfig(items="20:24"), share_context=True, advance=done.append
    )
    one = evaluate_hellaswag(model, tokenizer, HellaSwagConfig(items="22:23"), share_context=False)
    assert few.items()["item"].tolist() == [20, 21, 22, 23] and sum(done) == 4
    np.testing.assert_allclose(few.ll_N4[2], one.ll_N4[0], rtol=1e-6, atol=2e-4)
    assert (few.summary()["sharing"], one.summary()["sharing"]) == ("context", "none")
    assert few.summary()["bos"] == "auto: none"


def test_a_family_that_is_not_packable_is_scored_unshared_only() -> None:
    model, tokenizer, config = toy_model("gptj"), toy_tokenizer(), HellaSwagConfig(limit=2)
    with pytest.raises(EvaluationError, match="declared packable: 'gptj' is not"):
        evaluate_hellaswag(model, tokenizer, config, share_context=True)
    assert evaluate_hellaswag(model, tokenizer, config, share_context=False).ll_N4.shape == (2, 4)


def test_a_bad_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    config = HellaSwagConfig(path=tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="row 1"):
        evaluate_hellaswag(toy_model("llama"), toy_tokenizer(), config, share_context=True)
