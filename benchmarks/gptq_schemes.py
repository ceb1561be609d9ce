"""GPTQ for eight weight schemes in one go, against eight runs of a peer; one linear, CPU, one thread.

    make peers                                                the environment of the peers, .venv-peers
    .venv-peers/bin/python benchmarks/gptq_schemes.py [--tokens 8192] [--rounds 3] [--shapes 576x576 ...]

Peers: the loop of gptqmodel 7.7 itself, where it can be imported (it can in .venv-peers), and the published algorithm
(IST-DASLab/gptq) in words of our own, which rounds on quantlab's grids, so that its losses compare solvers and
nothing else. Each run of a peer accumulates its own Hessian, since eight runs do. Everybody damps by 0.01, keeps the
order of channels, and fixes ranges before the first column. The sides alternate; CPU time of the best round counts.
The loss of a layer is tr((W - What) X^T X (W - What)^T).

O: outputs, I: inputs, T: tokens.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from quantlab.calibration.statistics import LinearStats
from quantlab.machine import cpu_line
from quantlab.methods.config import GptqConfig, MethodConfig
from quantlab.methods.gptq import quantize_weights
from quantlab.methods.grids import fit_grid
from quantlab.schemes import Scheme, TensorSpec

SCHEMES = ("w8", "w6", "w4", "w4g64", "w4g32z", "w3g64", "w3", "w2g32")
SHAPES = ("576x576", "576x1536", "2048x2048")
BATCH, BLOCK, DAMPING = 512, 128, 0.01
FULL, SEARCHED = (
    MethodConfig(gptq=GptqConfig(act_order=False, block_size=BLOCK, damping=DAMPING, clip_steps=steps))
    for steps in (1, GptqConfig().clip_steps)
)
"""On full ranges, as the peers, and on searched ones, quantlab's default."""

Solver = Callable[[Tensor, Tensor, list[TensorSpec]], list[Tensor]]
"""(weight_OI, x_TI, specs) -> the dequantized matrix of each spec."""


def gram_of(x_TI: Tensor) -> Tensor:
    """X^T X, batch by batch, as calibration meets the tokens."""
    gram_II = torch.zeros(x_TI.shape[1], x_TI.shape[1])
    for batch_BI in x_TI.split(BATCH):
        gram_II.addmm_(batch_BI.t(), batch_BI)
    return gram_II


def searched(weight_OI: Tensor, x_TI: Tensor, specs: list[TensorSpec]) -> list[Tensor]:
    """The same on searched ranges, quantlab's default."""
    return quantlab(weight_OI, x_TI, specs, SEARCHED)


def quantlab(
    weight_OI: Tensor, x_TI: Tensor, specs: list[TensorSpec], config: MethodConfig = FULL
) -> list[Tensor]:
    """All specs from one Hessian."""
    unread_I = torch.zeros(x_TI.shape[1])
    stats = LinearStats(gram_of(x_TI), unread_I, unread_I, unread_I, len(x_TI))
    return [
        solved.quantized.dequantize() for solved in quantize_weights(weight_OI, specs, stats, config=config)
    ]


def published(weight_OI: Tensor, x_TI: Tensor, specs: list[TensorSpec]) -> list[Tensor]:
    """One run for each spec."""
    return [published_one(weight_OI, x_TI, spec) for spec in specs]


def published_one(weight_OI: Tensor, x_TI: Tensor, spec: TensorSpec) -> Tensor:
    """Frantar et al. 2022, algorithm 1: Cholesky factor of the inverse, errors fed on, blocks of columns."""
    hessian_II = gram_of(x_TI) * (2 / len(x_TI))
    hessian_II.diagonal().add_(DAMPING * hessian_II.diagonal().mean())
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(hessian_II))
    factor_II = torch.linalg.cholesky(inverse_II, upper=True)
    scale_OI, low_OI, high_OI = (
        row.t().contiguous()
        for row in fit_grid(weight_OI, spec, torch.float32).rows(torch.arange(len(factor_II)))
    )
    working_OI, what_OI = weight_OI.clone(), torch.zeros_like(weight_OI)
    for start in range(0, len(factor_II), BLOCK):
        stop = min(start + BLOCK, len(factor_II))
        block_OB, errors_OB = working_OI[:, start:stop].clone(), torch.zeros_like(working_OI[:, start:stop])
        factor_BB = factor_II[start:stop, start:stop]
        for k in range(stop - start):
            column_O, scale_O = block_OB[:, k], scale_OI[:, start + k]
            codes_O = (column_O / scale_O).round().clamp(low_OI[:, start + k], high_OI[:, start + k])
            what_OI[:, start + k] = codes_O * scale_O
            error_O = (column_O - what_OI[:, start + k]) / factor_BB[k, k]
            block_OB[:, k:] -= error_O[:, None] * factor_BB[k, k:]
            errors_OB[:, k] = error_O
        working_OI[:, stop:] -= errors_OB @ factor_II[start:stop, stop:]
    return what_OI


def gptqmodel_solver() -> Solver | None:
    """gptqmodel's own class, or None where the library is not installed."""
    try:
        from gptqmodel.quantization.config import QuantizeConfig
        from gptqmodel.quantization.gptq import GPTQ
    except ImportError:
        return None

    def solve_one(weight_OI: Tensor, x_TI: Tensor, spec: TensorSpec) -> Tensor:
        linear = torch.nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
        linear.weight.data = weight_OI.clone()
        task = GPTQ(
            linear,
            QuantizeConfig(
                bits=spec.bits,
                group_size=spec.group_size or -1,
                sym=spec.symmetric,
                desc_act=False,
                act_group_aware=False,
                damp_percent=DAMPING,
            ),
        )
        task.quantizer.configure(perchannel=True)
        for batch_BI in x_TI.split(BATCH):
            task.add_batch(batch_BI[None], batch_BI[None])
        what_OI: Tensor = task.quantize(blocksize=BLOCK)[0]
        return what_OI.detach()

    return lambda weight_OI, x_TI, specs: [solve_one(weight_OI, x_TI, spec) for spec in specs]


def layer(shape: str, tokens: int) -> tuple[Tensor, Tensor]:
    """A random matrix and inputs that share directions, as hidden states do."""
    outputs, inputs = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    shared_TI = torch.randn(tokens, inputs // 8, generator=generator) @ torch.randn(
        inputs // 8, inputs, generator=generator
    )
    sizes_I = torch.exp(0.5 * torch.randn(inputs, generator=generator))
    return weight_OI, (0.3 * shared_TI + torch.randn(tokens, inputs, generator=generator)) * sizes_I


def losses(weight_OI: Tensor, x_TI: Tensor, made: list[Tensor]) -> list[float]:
    """tr((W - What) X^T X (W - What)^T) of each matrix, in float64."""
    gram_II = gram_of(x_TI).double()
    errors = [(weight_OI - what_OI).double() for what_OI in made]
    return [float(((error_OI @ gram_II) * error_OI).sum()) for error_OI in errors]


def compare(shape: str, tokens: int, rounds: int, sides: dict[str, Solver]) -> list[str]:
    """The table's rows of one shape."""
    specs = [spec for name in SCHEMES if isinstance(spec := Scheme.parse(name).weights, TensorSpec)]
    weight_OI, x_TI = layer(shape, tokens)
    seconds = dict.fromkeys(sides, float("inf"))
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, solver in sides.items():
            start = time.process_time()
            made = solver(weight_OI, x_TI, specs)
            seconds[name] = min(seconds[name], time.process_time() - start)
            found[name] = losses(weight_OI, x_TI, made)
    rows = []
    for peer in sides.keys() - OURS.keys():
        for name in OURS:
            ratios = [ours / theirs for ours, theirs in zip(found[name], found[peer], strict=True)]
            rows.append(
                f"| {shape} | {peer} | {name} | {seconds[peer]:.2f} | {seconds[name]:.2f} "
                f"| {seconds[peer] / seconds[name]:.1f} | {' '.join(f'{ratio:.4f}' for ratio in ratios)} |"
            )
    return sorted(rows, reverse=True)


OURS: dict[str, Solver] = {"full ranges": quantlab, "searched ranges": searched}
"""What quantlab does: ranges as the peers take them, and its default."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="outputs x inputs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sides: dict[str, Solver] = {**OURS, "published loop": published}
    if (solver := gptqmodel_solver()) is not None:
        sides["gptqmodel"] = solver
    sys.stdout.write(
        f"{cpu_line()}\n"
        f"{len(SCHEMES)} schemes, {options.tokens} tokens, best of {options.rounds}, torch {torch.__version__}\n\n"
        "| O x I | peer | quantlab | peer, CPU s | quantlab, CPU s | ratio | loss, quantlab / peer: "
        f"{' '.join(SCHEMES)} |\n|---|---|---|---|---|---|---|\n"
    )
    for shape in options.shapes:
        for row in compare(shape, options.tokens, options.rounds, sides):
            sys.stdout.write(row + "\n")


if __name__ == "__main__":
    main()
