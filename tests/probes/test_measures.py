"""Outlier measures against their formulas written out in numpy."""

import numpy as np
import pytest
import torch

from probes import measures
from probes.running.magnitudes import Magnitudes
from probes.running.moments import Moments


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_table5() -> None:
    x = normal(1000).bfloat16().float()
    statistics = Magnitudes(100, ("at",))
    statistics.add([x], lambda topk: topk.add(x, lambda at: at[:, None]))
    found, order = measures.table5(statistics), x.abs().sort(descending=True).values
    assert [found[f"top{k}"] for k in (1, 2, 3, 10, 100)] == [order[k - 1].item() for k in (1, 2, 3, 10, 100)]
    assert found["median"] == x.abs().median().item()
    assert found["top1_over_median"] == order[0].item() / x.abs().median().item()
    assert (found["n"], found["nan"], found["inf"]) == (1000, 0, 0)
    assert found["std"] == pytest.approx(x.double().std(correction=0).item())


def test_table5_of_few_values_has_no_rank_beyond_them() -> None:
    statistics, x = Magnitudes(100, ("at",)), torch.tensor([0.0, 0.0, float("inf")])
    statistics.add([x], lambda topk: topk.add(x, lambda at: at[:, None]))
    found = measures.table5(statistics)
    assert (found["top1"], found["top3"], found["median"], found["top1_over_median"]) == (
        0.0,
        None,
        0.0,
        None,
    )
    assert (found["n"], found["inf"]) == (2, 1)


def test_massive_activations() -> None:
    assert measures.massive_threshold(0.01) == 100
    assert measures.massive_threshold(0.5) == 500
    top3 = np.array([[[4.0, 2.0, 1.0], [2.0, 2.0, 1.0]], [[900.0, 3.0, 2.0], [500.0, 1.0, 0.0]]])
    found = measures.massive_activations(top3, np.array([[0.5, 1.5], [0.25, 0.75]]), [0, 3])
    assert (found["num_activations"], found["num_layers"]) == (3, 1)
    assert (found["largest"], found["largest_layer"], found["largest_over_median"]) == (700.0, 1, 1400.0)
    assert found["per_layer"][0] == {
        "layer": 0,
        "num": 0,
        "top1": 3.0,
        "top2": 2.0,
        "top3": 1.0,
        "median": 1.0,
    }


def test_llm_int8_outlier_features() -> None:
    # 8 tensors of 4 layers, 100 positions, 3 channels
    hits = np.zeros((8, 3), np.int64)
    hits[:, 0] = 50  # in every layer and half of the positions
    hits[0, 1] = 100  # one layer of four, 12.5% of positions
    hits[:, 2] = 5  # in every layer, 5% of positions: too few
    found = measures.llm_int8_outlier_features(hits, 100, [0, 0, 1, 1, 2, 2, 3, 3])
    assert [feature["channel"] for feature in found["features"]] == [0, 1]
    assert found["features"][1] == {"channel": 1, "layers": 0.25, "positions": 0.125}
    assert (found["num_features"], found["share_of_layers"], found["share_of_positions"]) == (2, 1.0, 0.5)
    none = measures.llm_int8_outlier_features(np.zeros((2, 3), np.int64), 10, [0, 1])
    assert (none["num_features"], none["share_of_layers"]) == (0, 0.0)


def test_kurtosis_is_the_papers() -> None:
    x = (normal(500) * 3).double()
    moments = Moments()
    moments.add(x)
    expected = ((x - x.mean()) ** 4).mean() / (
        x.std() ** 4 + 1e-6
    )  # torch.std is unbiased, as in the paper's code
    assert measures.kurtosis(moments.value()) == pytest.approx(expected.item(), rel=1e-12)


def test_over_tensors() -> None:
    values = {"a": [1.0, 3.0], "b": [5.0, 5.0], "c": [0.0, 0.0]}
    assert measures.over_tensors(values, "max") == {
        "value": 5.0,
        "largest_tensor": "b",
        "largest": 5.0,
        "num_tensors": 3,
    }
    assert measures.over_tensors(values, "mean")["value"] == pytest.approx(7 / 3)


def test_outlier_feature_kurtosis_lies_between_1_and_the_width() -> None:
    assert measures.outlier_feature_kurtosis(torch.full((16,), 3.0)) == 1
    assert measures.outlier_feature_kurtosis(torch.eye(16)[3]) == pytest.approx(16)
    assert measures.outlier_feature_kurtosis(torch.zeros(16)) == 1


def test_incoherence_lies_between_1_and_sqrt_mn() -> None:
    assert measures.incoherence(torch.full((4, 9), -2.0)) == pytest.approx(1)
    one = torch.zeros(4, 9)
    one[1, 2] = -3
    assert measures.incoherence(one) == pytest.approx(6)
    assert measures.incoherence(torch.zeros(2, 2)) == 1
    w = normal(32, 48)
    assert measures.incoherence(w) == pytest.approx(
        (w.abs().max() * (32 * 48) ** 0.5 / w.norm()).item(), rel=1e-6
    )


def test_sink_rate_and_ratios() -> None:
    assert measures.sink_rate(torch.tensor([0.1, 0.31, 0.9, 0.3])) == 50
    assert measures.max_over_median(torch.tensor([1.0, 2.0, 8.0])) == 4
    assert measures.max_over_median(torch.tensor([0.0, 0.0, 8.0])) is None
    assert measures.spread([1.0, 3.0]) == {"mean": 2.0, "max": 3.0}
