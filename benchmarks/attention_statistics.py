"""Statistics of all causal attention logits at length 8192: query blocks at the sites against whole tensors.

    python benchmarks/attention_statistics.py [--length 8192] [--repeats 3]

Both sides run one attention layer with one head pair (2 heads, d = 64) in float32 on one thread and give its output,
the 10 largest |logit| with place, the first four moments of the logits, and the log-sum-exp and entropy of every row.

    eager   whole tensors: q k^T, mask, softmax, topk, moments, log-sum-exp, entropy, probs v. Plain torch, each step
            one operation where torch has one, in place where that is possible, nothing computed twice.
    ours    the forward of a one-layer OPT inside attention_sites, with watch on its sites: projections, MLP and norms
            are paid for here, not by the peer.

Then the exact median of |logit|: ours in two passes (a second forward, which ends with the logits), eager by kthvalue
on the whole tensor.

Every run is a process of its own, the sides alternate, and the least of the repeats counts. A process computes twice:
the first time for memory, the growth of its peak resident size (model and inputs loaded, libraries warmed on a short
sequence), the second for CPU time (process_time), with what an allocator keeps at hand.
"""

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

NUM_HEADS, HEAD_DIM, TOP_K = 2, 64, 10


def make_model(length: int) -> Any:
    """A one-layer OPT with one head pair, random weights, and token ids [1, length]."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=512,
        hidden_size=NUM_HEADS * HEAD_DIM,
        word_embed_proj_dim=NUM_HEADS * HEAD_DIM,
        ffn_dim=2 * NUM_HEADS * HEAD_DIM,
        num_hidden_layers=1,
        num_attention_heads=NUM_HEADS,
        max_position_embeddings=length,
        init_std=0.2,  # so that logits reach several units, as in trained models
    )
    model = OPTForCausalLM(config).eval()
    return model, torch.randint(0, 512, (1, length))


def queries_and_keys(model: Any, ids: Any) -> tuple[Any, Any, Any]:
    """The layer's q, k and v as its attention function gets them, [1, H, T, d], without their scaling."""
    from transformers import AttentionInterface, AttentionMaskInterface

    kept = []

    def keep(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> tuple[Any, None]:
        kept.append((q * (options["scaling"] * HEAD_DIM**0.5), k.contiguous(), v.contiguous()))
        return v.transpose(1, 2).contiguous(), None

    AttentionInterface.register("keep", keep)
    AttentionMaskInterface.register("keep", lambda *args, **options: None)
    model.set_attn_implementation("keep")
    model.model.decoder(ids, use_cache=False)
    return kept[0]


def eager(q: Any, k: Any, v: Any, *, median: bool) -> dict[str, Any]:
    """Everything from whole T x T tensors."""
    import torch

    length = q.shape[2]
    logits = (q @ k.transpose(-1, -2)).mul_(HEAD_DIM**-0.5)
    hidden = torch.ones(length, length, dtype=torch.bool).triu_(1)
    count = NUM_HEADS * length * (length + 1) // 2
    magnitudes = logits.abs().masked_fill_(hidden, -1.0).flatten()
    top = magnitudes.topk(TOP_K)
    exact = magnitudes.kthvalue(magnitudes.numel() - count + (count - 1) // 2 + 1).values if median else None
    del magnitudes
    deviation = logits.masked_fill(hidden, 0.0).double()
    mean = deviation.sum() / count
    deviation.sub_(mean).masked_fill_(hidden, 0.0)
    square = deviation.square()
    flat, flat_square = deviation.flatten(), square.flatten()
    central = [square.sum(), torch.dot(flat, flat_square), torch.dot(flat_square, flat_square)]
    del deviation, square, flat, flat_square
    logits.masked_fill_(hidden, -torch.inf)
    lse = logits.logsumexp(-1)
    probs = logits.softmax(-1)
    entropy = torch.special.entr(probs).sum(-1)
    output = probs @ v
    return {
        "top": top.values.tolist(),
        "places": [[i // length**2, i // length % length, i % length] for i in top.indices.tolist()],
        "moments": [count, float(mean), *(float(each) / count for each in central)],
        "lse": float(lse.double().mean()),
        "entropy": float(entropy.double().mean()),
        "output": float(output.double().square().mean()),
        "median": None if exact is None else float(exact),
    }


def ours(model: Any, ids: Any, *, median: bool) -> dict[str, Any]:
    """Everything from query blocks, through a forward of the model."""
    import numpy as np
    import torch

    from probes.attention import attention_sites
    from probes.hooks import EarlyStop, watch
    from probes.running.histogram import Histogram
    from probes.running.median import ExactQuantile
    from probes.running.moments import Moments
    from probes.running.topk import TopK
    from probes.sites import attention_layers

    length = ids.shape[1]
    moments, top, histogram = Moments(), TopK(TOP_K, ("head", "query", "key")), Histogram()
    lse, entropy = torch.empty(NUM_HEADS, length), torch.empty(NUM_HEADS, length)
    outputs: list[Any] = []
    logits: list[Any] = []

    def see_logits(name: str, module: Any, args: Any, output: Any) -> None:
        x, block = args

        def place(at: Any) -> Any:
            _, head, row, column = np.unravel_index(at, tuple(x.shape))
            return np.stack([head, row + block.start, column + block.key_start], axis=1)

        for part in block.visible_parts(x):
            moments.add(part)
            if median:
                histogram.add_finite(part)
        top.add(x, place, block.visible)
        logits.append(x)

    def see_probs(name: str, module: Any, args: Any, output: Any) -> None:
        # The block's logits live until here, with what is hidden at -inf, where the probability is 0.
        x, (probs, block) = logits.pop(), args
        rows = slice(block.start, block.start + probs.shape[2])
        last = block.seen_by_all[1]
        mean = np.vecdot(probs[..., :last].numpy(), x[..., :last].numpy())
        mean += (probs[..., last:] * x[..., last:]).nan_to_num_(0.0).sum(-1).numpy()
        lse[:, rows] = log_sum_exp(x, probs)[0]
        entropy[:, rows] = lse[:, rows] - torch.from_numpy(mean[0])

    exact = None
    with attention_sites(model):
        with (
            watch(model, "*.attn_logits", see_logits),
            watch(model, "*.attn_probs", see_probs),
            watch(model, "*.out_proj", lambda name, module, args, output: outputs.append(args[0])),
        ):
            model.model.decoder(ids, use_cache=False)
        if median:
            quantile = ExactQuantile(histogram)
            attention_layers(model)[-1][1].attn_logits = second_pass(quantile)
            with contextlib.suppress(EarlyStop):
                model.model.decoder(ids, use_cache=False)
            exact = quantile.value()
    value, columns = moments.value(), top.value()
    third = value.skewness * value.variance**1.5
    return {
        "top": columns["value"].tolist(),
        "places": np.stack([columns["head"], columns["query"], columns["key"]], axis=1).tolist(),
        "moments": [value.n, value.mean, value.variance, third, value.fourth],
        "lse": float(lse.double().mean()),
        "entropy": float(entropy.double().mean()),
        "output": float(outputs[0].double().square().mean()),
        "median": exact,
    }


def second_pass(quantile: Any) -> Any:
    """A module for the last layer's attn_logits that sees every block before any is used, then ends the forward."""
    from torch import nn

    from probes.hooks import EarlyStop

    class SecondPass(nn.Module):
        spans_rows = True

        def begin(self) -> None:
            """Nothing to forget."""

        def observe(self, x_BHqt: Any, block: Any) -> None:
            for part in block.visible_parts(x_BHqt):
                quantile.add(part)

        def forward(self, x_BHqt: Any, block: Any) -> Any:
            raise EarlyStop

    return SecondPass()


def log_sum_exp(x_BHqt: Any, probs_BHqt: Any) -> Any:
    """x - log p is the same for every key: of key 0, which every query sees, or the largest where that underflows."""
    if float(probs_BHqt[..., 0].amin()) > 1e-30:
        return x_BHqt[..., 0] - probs_BHqt[..., 0].log()
    return x_BHqt.amax(-1) - probs_BHqt.amax(-1).log()


def run_side(side: str, length: int, *, median: bool) -> dict[str, Any]:
    """One side in this process: its CPU seconds, the growth of the peak resident size in MiB, and its results."""
    import torch

    torch.set_num_threads(1)
    with torch.no_grad():
        model, ids = make_model(length)
        tensors = queries_and_keys(model, ids) if side == "eager" else ()
        short = ids[:, :256]

        def compute(ids: Any, tensors: tuple[Any, ...]) -> dict[str, Any]:
            return eager(*tensors, median=median) if side == "eager" else ours(model, ids, median=median)

        compute(short, tuple(each[:, :, :256].contiguous() for each in tensors))
        before = _peak()
        result = compute(ids, tensors)
        growth, start = _peak() - before, time.process_time()
        again = compute(ids, tensors)
        seconds = time.process_time() - start
    assert again == result
    return {"seconds": seconds, "growth": growth, "result": result}


def _peak() -> float:
    """Peak resident size of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def best_of(side: str, runs: list[dict[str, Any]]) -> tuple[float, float, dict[str, Any]]:
    """Least seconds, least growth, and the result, which every run must repeat."""
    assert all(run["result"] == runs[0]["result"] for run in runs), f"{side} differs between runs"
    return min(run["seconds"] for run in runs), min(run["growth"] for run in runs), runs[0]["result"]


def check_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Both sides found the same: places exactly, values within float32 rounding."""
    assert one["places"] == other["places"], (one["places"], other["places"])
    pairs = [*zip(one["top"], other["top"], strict=True), *zip(one["moments"], other["moments"], strict=True)]
    pairs += [(one[name], other[name]) for name in ("lse", "entropy", "output")]
    pairs += [(one["median"], other["median"])] if one["median"] is not None else []
    for a, b in pairs:
        assert abs(a - b) <= 1e-4 * max(abs(a), abs(b)) + 1e-6, (a, b)


def table(found: dict[tuple[str, bool], tuple[float, float, dict[str, Any]]], length: int) -> str:
    """The results as a Markdown table with the ratios below."""
    lines = [
        f"Length {length}, {NUM_HEADS} heads, d = {HEAD_DIM}, float32, one thread.",
        "",
        "| statistics | eager CPU s | ours CPU s | ratio | eager peak MiB | ours peak MiB | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for median in (False, True):
        (theirs, their_peak, _), (mine, my_peak, _) = found["eager", median], found["ours", median]
        name = "top-10, moments, log-sum-exp, entropy" + (", exact median" if median else "")
        peaks = f"{their_peak:.0f} | {my_peak:.1f} | {their_peak / max(my_peak, 1e-3):.0f}"
        lines.append(f"| {name} | {theirs:.2f} | {mine:.3f} | {theirs / mine:.1f} | {peaks} |")
    ratio = found["ours", True][0] / found["ours", False][0]
    lines += ["", f"The exact median (two passes) takes {ratio:.2f} times the time without it."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention statistics: query blocks against whole tensors.")
    parser.add_argument("--length", type=int, default=8192, help="tokens")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side; the least counts")
    parser.add_argument(
        "--side", choices=("eager", "ours"), help="run one side in this process and print JSON"
    )
    parser.add_argument("--median", action="store_true", help="with --side: the exact median too")
    options = parser.parse_args()
    if options.side:
        sys.stdout.write(json.dumps(run_side(options.side, options.length, median=options.median)))
        return
    cases = [(side, median) for median in (False, True) for side in ("eager", "ours")]
    runs: dict[tuple[str, bool], list[dict[str, Any]]] = {case: [] for case in cases}
    for _ in range(options.repeats):
        for side, median in cases:
            command = [sys.executable, __file__, "--side", side, "--length", str(options.length)]
            output = subprocess.run(
                [*command, *(["--median"] if median else [])], check=True, capture_output=True
            )
            runs[side, median].append(json.loads(output.stdout))
    found = {case: best_of(case[0], runs[case]) for case in cases}
    for median in (False, True):
        check_same(found["eager", median][2], found["ours", median][2])
    from quantlab.machine import cpu_line  # not where a side is measured

    sys.stdout.write(f"{cpu_line()}\n{table(found, options.length)}\n")


if __name__ == "__main__":
    main()
