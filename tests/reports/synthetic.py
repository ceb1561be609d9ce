"""Runs made of records with invented but lifelike results, written with quantlab.records as a sweep writes them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quantlab import statistics
from quantlab.records import Record, write_record, write_sealed

LOSSES = {
    "w16": 0.0, "w8": 0.0004, "w6": 0.012, "w4": 0.9, "w4g64": 0.35, "w4g32z": 0.0, "w8a8": 0.004, "w6a6": 0.09,
    "w4a8": 0.9, "w4a4": 3.1, "l8t": 0.001, "l6t": 0.03, "l4t": 1.4,
}  # fmt: skip
"""Scheme -> nats per token that it loses."""
DEMO = ("w16", "w8", "w6", "w4", "w4g64", "w8a8", "w6a6", "w4a4", "l8t", "l6t", "l4t")
TOKENS = "d4" * 32
"""Digest of the tokens of the text."""
NUM_WEIGHTS = 106_000_000
NUM_LAYERS = 8
STATISTICS = ("top1", "top2", "top3", "top10", "top100")


def write_run(
    folder: Path,
    *,
    checkpoints: Sequence[str] = ("SmolLM2-135M-Instruct",),
    schemes: Sequence[str] = DEMO,
    tasks: Sequence[str] = ("hellaswag", "perplexity"),
    profile: bool = True,
    num_documents: int = 64,
    tokens: Sequence[str] = ("<|im_start|>", "\n", " the", " of"),
    absent: Sequence[tuple[str, str]] = (),
    compare: Sequence[str] = (),
    **checkpoint: Any,
) -> list[Record]:
    """Write a run; returns its records. `absent` names (checkpoint, scheme) pairs that are planned but not written;
    `compare` the baseline and the variants that the run declares matched."""
    planned, written = [], []
    for place, name in enumerate(checkpoints):
        cells = [profile_cell(name, place, tokens, **checkpoint)] if profile else []
        cells += [
            evaluation_cell(name, place, s, tasks, num_documents, **checkpoint) for s in schemes if tasks
        ]
        for record, items in cells:
            planned.append(record.key)
            if (name, record.made_by["scheme"]) not in absent or record.kind == "profile":
                write_record(folder, record, items, {})
                written.append(record)
    config = {
        "name": folder.name,
        "checkpoints": [{"path": f"models/{name}"} for name in checkpoints],
        "schemes": list(schemes),
        "profile": {"top_k": 100} if profile else None,
        "evaluation": {"tasks": list(tasks)} if tasks else None,
        "compare": comparison(compare),
    }
    write_sealed(folder / "run.json", {"config": config, "config_fingerprint": "0" * 64, "records": planned})
    return written


def comparison(names: Sequence[str]) -> dict[str, Any] | None:
    """The section `compare` that names the first of these checkpoints as the baseline of the others."""
    if not names:
        return None
    return {"baseline": f"models/{names[0]}", "against": [f"models/{name}" for name in names[1:]]}


def made_by(name: str, scheme: str, **checkpoint: Any) -> dict[str, Any]:
    """What every record says of its making."""
    source = {
        "name": name, "content_hash": f"{abs(sum(map(ord, name))):064x}", "architecture": "LlamaForCausalLM",
        "num_parameters": 134_515_008, "source_precision": "bfloat16", "source_scheme": None, "dtype": "float32",
    }  # fmt: skip
    data = {"hellaswag": "a1" * 32, "perplexity": "b2" * 32}
    kernel = "int8_mm" if "a" in scheme else "weight_only"
    settings = {
        "data": data,
        "evaluation": {"tasks": ["hellaswag"]},
        "kernel": kernel,
        "bos": "never: none",
        "code": "c3" * 32,
    }
    return {"checkpoint": source | checkpoint, "scheme": scheme, **settings}


def evaluation_cell(
    name: str, seed: int, scheme: str, tasks: Sequence[str], num_documents: int, **checkpoint: Any
) -> tuple[Record, dict[str, dict[str, Any]]]:
    """A scored scheme: the same documents and blocks for each, shifted by its loss."""
    loss, noise = LOSSES[scheme] * (0.5 + 0.5 * seed), np.random.default_rng([seed, *scheme.encode()])
    result: dict[str, Any] = {"checkpoint": {"name": name}, "quantization": quantization(scheme)}
    items: dict[str, dict[str, Any]] = {}
    if "hellaswag" in tasks:
        items["hellaswag"] = _documents(np.random.default_rng(seed), noise, num_documents, loss)
        result["hellaswag"] = _hellaswag(items["hellaswag"])
    if "perplexity" in tasks:
        items["perplexity"] = _blocks(np.random.default_rng(seed + 100), noise, loss)
        result["perplexity"] = _perplexity(items["perplexity"])
    record = Record.of("evaluation", made_by(name, scheme, **checkpoint), {"seed": seed}, result)
    return record, items


def _documents(base: np.random.Generator, noise: np.random.Generator, n: int, loss: float) -> dict[str, Any]:
    # The same documents for every checkpoint.
    item = np.sort(np.random.default_rng(3).choice(10_042, n, replace=False))
    margin = base.normal(0.2, 4.0, n) + (noise.normal(-0.4, 0.9, n) * 4 * loss if loss else 0.0)
    margin_norm = margin / base.uniform(60, 120, n) + base.normal(0.005, 0.02, n)
    return {
        "item": item, "label": item % 4, "margin": margin, "margin_norm": margin_norm, "correct": margin > 1.2,
        "correct_norm": margin_norm > 0,
    }  # fmt: skip


def _hellaswag(items: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "n": len(items["item"]),
        **statistics.proportion(items["correct"]).summary("acc"),
        **statistics.proportion(items["correct_norm"]).summary("acc_norm"),
        **statistics.mean(items["margin"]).summary("margin"),
        **statistics.mean(items["margin_norm"]).summary("margin_norm"),
        "acc_norm_normaliser": "characters", "num_fewshot": 0, "bos": "never: none", "sharing": "context",
    }  # fmt: skip


def _blocks(base: np.random.Generator, noise: np.random.Generator, loss: float) -> dict[str, Any]:
    num_tokens = np.full(12, 511)
    nats = num_tokens * (base.normal(2.95, 0.12, 12) + loss * noise.normal(1.0, 0.15, 12))
    return {"item": np.arange(12) * 7, "document": np.arange(12) * 2, "num_tokens": num_tokens, "nats": nats}


def _perplexity(items: Mapping[str, Any]) -> dict[str, Any]:
    nats = statistics.text_ratio(items["nats"], items["num_tokens"], items["document"])
    ends = [float(np.exp(end)) for end in (nats.low, nats.high)]
    return {
        "num_tokens": int(items["num_tokens"].sum()), "num_blocks": 12, "num_documents": 12,
        **nats.summary("nats_per_token"), "n": 12, "perplexity": float(np.exp(nats.value)),
        "perplexity_stderr": float(np.exp(nats.value) * nats.stderr),
        "perplexity_interval": ends, "sequence_length": 512, "tokens_sha256": TOKENS,
        "interval_note": nats.note, "text_read_as": "its rows joined by two newlines",
    }  # fmt: skip


def quantization(scheme: str) -> dict[str, Any]:
    """What `Changes.summary()` says, for layers of two linears and an embedding."""
    bits = int(scheme[1]) if scheme.startswith("w") and scheme != "w16" else 16
    kernel = "simulated" if bits == 16 else "int8_mm" if "a" in scheme else "weight_only"
    storage = bits + (0.5 if "g" in scheme else 0.02 if bits < 16 else 0)
    linears = ("model.layers.*.self_attn.q_proj", "model.layers.*.mlp.down_proj") if bits < 16 else ()
    names = linears or (("model.layers.*.self_attn.attn_logits",) if scheme.startswith("l") else ())
    size = NUM_WEIGHTS // (2 * NUM_LAYERS) if linears else 0
    table = [
        {
            "count": NUM_LAYERS,
            "name": name,
            "action": "swapped",
            "why": scheme,
            "bits": bits,
            "num_weights": size,
            "kernel": kernel,
        }
        for name in names
    ]
    if table:
        why = "outside the decoder layers (embeddings and lm_head stay at 16 bits)"
        kept = {"count": 1, "name": "model.embed_tokens", "action": "skipped", "why": why, "bits": 16}
        table.append(kept | {"num_weights": 28_311_552, "kernel": ""})
    return {
        "scheme": scheme,
        "share_by_bits": {str(bits): 1.0},
        "average_storage_bits": storage,
        "weights_bytes": int(NUM_WEIGHTS * storage / 8 + 28_311_552 * 2),
        "kernels": {kernel: NUM_LAYERS * len(names)} if names else {},
        "table": table,
    }


def profile_cell(
    name: str, seed: int, tokens: Sequence[str], **checkpoint: Any
) -> tuple[Record, dict[str, dict[str, Any]]]:
    """A profile of a few layers with a massive activation in one channel."""
    draw = np.random.default_rng([7, seed])
    edges = np.geomspace(1e-4, 1.0, 200)
    items: dict[str, list[Any]] = {"tensor": [], "layer": [], "map": [], "magnitude": [], "count": []}
    result: dict[str, Any] = {"num_sequences": 8, "sequence_length": 512, "unprofiled": None}
    for tensor, top, median in (
        ("attention_logits", 60.0 / (1 + seed), 2.4),
        ("hidden_states", 9800.0 / (1 + seed), 0.9),
    ):
        by_layer = [_layer(tensor, layer, top, median, draw) for layer in range(NUM_LAYERS)]
        best = max(by_layer, key=lambda row: row["top1"])
        result[tensor] = {
            "n": 1_180_000_000, **{k: best[k] for k in STATISTICS}, "median": median,
            "top1_over_median": best["top1"] / median, "nan": 0, "inf": 0, "per_layer": by_layer,
            "top": [_top(tensor, rank, best, draw, tokens) for rank in range(20)],
        }  # fmt: skip
        for row in by_layer:
            counts = (1e7 * (edges / 0.002 + 1) ** -2.2).astype(np.int64)
            counts[(edges > 0.03) & (edges < 0.9)] = 0
            for name_, column in (("tensor", [tensor] * 200), ("layer", [row["layer"]] * 200), ("map", [0] * 200),
                                  ("magnitude", edges * row["top1"]), ("count", counts)):  # fmt: skip
                items[name_].extend(column)
    result["measures"] = {
        "massive_activations": {
            "num_activations": 12,
            "num_layers": 24,
            "largest": 9800.0,
            "per_layer": [{"layer": 0}],
        },
        "llm_int8_outlier_features": {"num_features": 3, "share_of_layers": 0.9},
        "inf_norm": {"value": 9800.0, "largest_tensor": "model.layers.4"},
        "kurtosis": {"value": 1778.4, "num_tensors": 151},
        "attention_sink_rate": {"length": 64, "threshold": 0.3, "all_maps": 61.2},
    }
    if "diff" in name:
        result["measures"] |= _differential(varies="v2" in name)
    record = Record.of("profile", made_by(name, "w16", **checkpoint), {"seed": seed}, result)
    return record, {"histogram": {key: np.array(column) for key, column in items.items()}}


def _differential(*, varies: bool) -> dict[str, Any]:
    """What only a differential model has: lambda of each layer, and sink rates of both maps and their difference."""
    means = [0.2 + 0.08 * layer for layer in range(NUM_LAYERS)]
    spread = 0.1 if varies else 0.0
    rows = [
        {"layer": layer, "mean": mean, "min": mean - spread, "max": mean + spread}
        for layer, mean in enumerate(means)
    ]
    rates = {
        "all_maps": 40.5,
        "map_0": 50.0,
        "map_1": 31.0,
        "difference": 12.5,
        "signed_difference_mean": 0.02,
    }
    return {
        "differential_lambda": {"per_layer": rows},
        "attention_sink_rate": {"length": 64, "threshold": 0.3} | rates,
    }


def _layer(tensor: str, layer: int, top: float, median: float, draw: np.random.Generator) -> dict[str, Any]:
    shape = (
        (0.55 + 0.45 * np.sin(layer / 4) ** 2)
        if tensor == "attention_logits"
        else (1.0 if layer > 1 else 0.002)
    )
    values = np.sort(top * shape * draw.uniform(0.93, 1.0, 5))[::-1]
    values[3] *= 0.9 if tensor == "attention_logits" else 0.5
    values[4] = values[3] * (0.85 if tensor == "attention_logits" else 0.02)
    level = median * (0.6 + layer / 40)
    return {
        "layer": layer,
        "map": None,
        "n": 4_718_592,
        **dict(zip(STATISTICS, map(float, values), strict=True)),
        "median": level,
    }


def _top(
    tensor: str, rank: int, best: Mapping[str, Any], draw: np.random.Generator, tokens: Sequence[str]
) -> dict[str, Any]:
    value, token = best["top1"] * 0.99**rank, tokens[rank % len(tokens)]
    common = {"value": value, "layer": best["layer"], "sequence": rank % 8}
    if tensor == "attention_logits":
        query = int(draw.integers(1, 511))
        return common | {
            "head": 4,
            "map": 0,
            "query": query,
            "key": 0,
            "query_token": token,
            "key_token": tokens[0],
        }
    return common | {"position": 0 if rank % 4 else 17, "channel": 181 if rank % 5 else 45, "token": token}
