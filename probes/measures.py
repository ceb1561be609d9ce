"""Outlier measures by their papers' definitions, from running statistics; each names its source.

`massive_activations` and its neighbours are pure: they take statistics that `probes.collectors` has filled and give
JSON-ready numbers. Where a paper leaves a choice open, the docstring says which reading this is.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.running.magnitudes import Magnitudes
from probes.running.moments import MomentValues

TOP_RANKS = (1, 2, 3, 10, 100)
"""The ranks of Table 5."""
MASSIVE_MAGNITUDE, MASSIVE_RATIO = 100.0, 1000.0
"""Sun et al.'s thresholds: absolute, and times the median of the hidden state."""
INT8_MAGNITUDE, INT8_LAYERS, INT8_POSITIONS = 6.0, 0.25, 0.06
"""Dettmers et al.'s thresholds: magnitude, share of layers, share of positions."""
SINK_LENGTH, SINK_THRESHOLD = 64, 0.3
"""Gu et al.'s T and epsilon."""


def table5(statistics: Magnitudes) -> dict[str, Any]:
    """The k-th largest |x| for k = 1, 2, 3, 10, 100 and the median, of all values pooled.

    The median is the lower one, within 2^-8 relative (exact for bfloat16 data). n counts finite values; a rank beyond
    n is None.

    Source: Ye et al. 2024, arXiv:2410.05258, table 5: logits after scaling, of both softmax maps of a pair, before
    subtraction; hidden states are the layers' outputs. That masked positions are left out, and that all layers,
    heads, tokens and channels are pooled, is our reading.
    """
    histogram, moments = statistics.histogram, statistics.moments.value()
    median, top1 = histogram.quantile(0.5), statistics.topk.nth(1)
    return {
        "n": histogram.n,
        **{f"top{rank}": statistics.topk.nth(rank) for rank in TOP_RANKS},
        "median": median,
        "top1_over_median": top1 / median if top1 is not None and median else None,
        "mean": moments.mean,
        "std": moments.variance**0.5,
        "kurtosis": moments.kurtosis,
        "nan": histogram.nan,
        "inf": histogram.pos_inf + histogram.neg_inf,
    }


def massive_threshold(median: float) -> float:
    """The magnitude above which an activation is massive, given the median magnitude of its hidden state.

    Source: Sun et al. 2024, arXiv:2402.17762, section 2.2: above 100 and at least about 1000 times the median.
    """
    return max(MASSIVE_MAGNITUDE, MASSIVE_RATIO * median)


def massive_activations(
    top3_LN3: NDArray[Any], medians_LN: NDArray[Any], counts_L: Sequence[int]
) -> dict[str, Any]:
    """Massive activations of the layers' outputs.

    Args:
        top3_LN3: the three largest |x| of each layer and sequence.
        medians_LN: the lower median of |x| of each layer and sequence, within 2^-8.
        counts_L: activations beyond `massive_threshold` in each layer, all sequences.

    Source: Sun et al. 2024, arXiv:2402.17762; per layer the top three and the median of each sequence's [T, D]
    tensor, averaged over sequences, as in the authors' code.
    """
    top3, medians = top3_LN3.mean(1), medians_LN.mean(1)
    largest = int(top3[:, 0].argmax())
    return {
        "num_activations": int(sum(counts_L)),
        "num_layers": int(sum(count > 0 for count in counts_L)),
        "largest": float(top3[largest, 0]),
        "largest_layer": largest,
        "largest_over_median": float(top3[largest, 0] / medians[largest]) if medians[largest] else None,
        "per_layer": [
            {
                "layer": layer,
                "num": int(num),
                "top1": row[0],
                "top2": row[1],
                "top3": row[2],
                "median": median,
            }
            for layer, (num, row, median) in enumerate(
                zip(counts_L, top3.tolist(), medians.tolist(), strict=True)
            )
        ],
    }


def llm_int8_outlier_features(
    hits_LD: NDArray[np.int64], num_positions: int, layer_of: Sequence[int]
) -> dict[str, Any]:
    """Channels whose magnitude reaches 6 in at least 25% of layers and 6% of positions.

    Args:
        hits_LD: for each tensor (the inputs of attention projections and of FFN expansions) and channel, the
            positions at which |x| >= 6.
        num_positions: positions seen by each tensor.
        layer_of: the layer of each tensor.

    Source: Dettmers et al. 2022, arXiv:2208.07339, section 4. A layer counts when either of its tensors reaches 6 in
    the channel at all; the share of positions is over all positions of all tensors (our reading of "across all
    hidden states").
    """
    layers = np.unique(layer_of)
    reached = np.stack([hits_LD[np.asarray(layer_of) == layer].any(0) for layer in layers])
    share_layers, share_positions = reached.mean(0), hits_LD.sum(0) / (num_positions * len(hits_LD))
    features = np.flatnonzero((share_layers >= INT8_LAYERS) & (share_positions >= INT8_POSITIONS))
    order = features[np.argsort(-share_positions[features], kind="stable")]
    return {
        "num_features": len(features),
        "share_of_layers": float(share_layers[features].max()) if len(features) else 0.0,
        "share_of_positions": float(share_positions[features].max()) if len(features) else 0.0,
        "features": [
            {"channel": int(c), "layers": float(share_layers[c]), "positions": float(share_positions[c])}
            for c in order[:20]
        ],
    }


def kurtosis(moments: MomentValues) -> float:
    """Fourth standardised moment of one sequence's tensor, flattened: mean (x - mu)^4 / (std^4 + 1e-6), normal = 3.

    Source: Bondarenko et al. 2023, arXiv:2306.12929; the standard deviation is unbiased, as in the authors' code.
    """
    return moments.fourth / (moments.unbiased_variance**2 + 1e-6)


def over_tensors(per_tensor: dict[str, list[float]], reduce: str) -> dict[str, Any]:
    """Average each tensor's values over sequences, then `max` (the infinity norm) or `mean` (the kurtosis) of tensors.

    Source: Bondarenko et al. 2023, arXiv:2306.12929, as in the authors' code: tensors are the final norm, each layer's
    output, the FFN's output, both norms and the attention's output projection.
    """
    averages = {name: float(np.mean(values)) for name, values in per_tensor.items()}
    largest = max(averages, key=lambda name: averages[name])
    value = averages[largest] if reduce == "max" else float(np.mean(list(averages.values())))
    return {
        "value": value,
        "largest_tensor": largest,
        "largest": averages[largest],
        "num_tensors": len(averages),
    }


def outlier_feature_kurtosis(second_moment_D: Tensor) -> float:
    """Kurtosis over channels of the channels' root mean squares: mean_j s_j^4 / (mean_j s_j^2)^2, from 1 to D.

    Source: He et al. 2024, arXiv:2405.19279; s_j^2 is the mean of x_j^2 over positions.
    """
    mean = float(second_moment_D.mean())
    return float((second_moment_D**2).mean()) / mean**2 if mean else 1.0


def sink_rate(first_key_shares: Tensor) -> float:
    """Percentage of (sequence, layer, head) whose first key draws more than 0.3 of the first 64 queries' attention.

    Args:
        first_key_shares: mean over queries of the weight on the first key, one entry per (sequence, layer, head).

    Source: Gu et al. 2025, arXiv:2410.10781: Sink_1^eps with eps = 0.3 and T = 64. Causal attention of the first 64
    queries of a longer sequence is that of the 64 tokens alone.
    """
    return float(100 * (first_key_shares > SINK_THRESHOLD).double().mean())


def incoherence(weight: Tensor) -> float:
    """max |W| sqrt(m n) / ||W||_F, from 1 (all entries alike) to sqrt(m n) (one entry).

    Source: Chee et al. 2023, arXiv:2307.13304 (QuIP); Ashkboos et al. 2024, arXiv:2404.00456, equation 2.
    """
    weight = weight.detach()
    norm = float(
        torch.linalg.vector_norm(weight, dtype=torch.float64 if weight.device.type == "cpu" else None)
    )
    return float(weight.abs().amax()) * weight.numel() ** 0.5 / norm if norm else 1.0


def max_over_median(absmax_D: Tensor) -> float | None:
    """Largest channel absmax over the median channel absmax (lower median); None when that is zero.

    Source: Xiao et al. 2023, arXiv:2211.10438 (SmoothQuant) scales by channel absmax; it gives no scalar, this
    ratio is ours.
    """
    median = float(absmax_D.median())
    return float(absmax_D.amax()) / median if median else None


def spread(values: Iterable[float]) -> dict[str, float]:
    """Mean and largest of a measure over its tensors."""
    array = np.asarray(list(values), float)
    return {"mean": float(array.mean()), "max": float(array.max())}
