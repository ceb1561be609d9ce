"""GPTQ: against a textbook loop in float64, against RTN, alone and stacked, and on input that breaks solvers.

O: outputs, I: inputs, T: tokens.
"""

import pytest
import torch
from torch import Tensor

from quantlab.calibration.statistics import LinearStats
from quantlab.errors import ConfigError, SchemeError
from quantlab.methods import columns, gptq, hessian
from quantlab.methods.config import GptqConfig, MethodConfig
from quantlab.methods.gptq import quantize_weights
from quantlab.methods.needs import UNSEEN
from quantlab.methods.solved import Solved
from quantlab.numerics.affine import QuantizedTensor, choose_qparams, quantize
from quantlab.numerics.qtype import QType
from quantlab.schemes import TensorSpec

OUTPUTS, INPUTS, TOKENS = 40, 64, 512


def channel(bits: int, symmetric: bool = True) -> TensorSpec:
    return TensorSpec(bits, "channel", symmetric=symmetric)


def group(bits: int, size: int, symmetric: bool = True) -> TensorSpec:
    return TensorSpec(bits, "group", size, symmetric)


SPECS = [
    channel(8),
    channel(3, symmetric=False),
    TensorSpec(4, "tensor"),
    TensorSpec(5, "tensor", symmetric=False),
    group(4, 16),
    group(4, 32, symmetric=False),
    group(2, 8, symmetric=False),
    group(6, 64),
]
NAMES = [f"w{spec.bits}{spec.grain}{spec.modifiers}" for spec in SPECS]


def settings(**gptq: object) -> MethodConfig:
    return MethodConfig(gptq=GptqConfig.model_validate(gptq))


DEFAULT = MethodConfig()
DYNAMIC = settings(act_order=False, static_groups=False)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int = TOKENS, inputs: int = INPUTS, seed: int = 1) -> Tensor:
    """Inputs [T, I] that share directions, of channels of unlike size."""
    mixed_TI = random(tokens, inputs // 4, seed=seed) @ random(inputs // 4, inputs, seed=seed + 1)
    return (mixed_TI + random(tokens, inputs, seed=seed + 2)) * torch.linspace(0.2, 3, inputs)


def stats_of(x_TI: Tensor) -> LinearStats:
    return LinearStats(x_TI.T @ x_TI, x_TI.amin(0), x_TI.amax(0), x_TI.mean(0), len(x_TI))


def solve(
    weight_OI: Tensor, spec: TensorSpec, stats: LinearStats, config: MethodConfig = DEFAULT
) -> QuantizedTensor:
    """On full ranges, which is what the textbook and RTN take."""
    full = config.model_copy(update={"gptq": config.gptq.model_copy(update={"clip_steps": 1})})
    (solved,) = quantize_weights(weight_OI, [spec], stats, config=full)
    assert isinstance(solved.quantized, QuantizedTensor)
    return solved.quantized


def loss(weight_OI: Tensor, what_OI: Tensor, stats: LinearStats) -> float:
    """tr(D G D^T), in float64."""
    error_OI = weight_OI.double() - what_OI.double()
    return float(((error_OI @ stats.gram_II.double()) * error_OI).sum())


def nearest(weight_OI: Tensor, spec: TensorSpec) -> Tensor:
    """RTN's matrix, from the definition."""
    grid = [choose_range(part_OI, spec) for part_OI in parts(weight_OI, spec)]
    pairs = zip(parts(weight_OI, spec), grid, strict=True)
    return torch.cat([on_grid(part_OI, *qparams, spec) for part_OI, qparams in pairs], 1)


def parts(weight_OI: Tensor, spec: TensorSpec) -> tuple[Tensor, ...]:
    """Columns that share scales."""
    return weight_OI.split(spec.group_size or weight_OI.shape[1], 1)


def choose_range(part_OI: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor | None]:
    dims = (0, 1) if spec.granularity == "tensor" else (1,)
    return choose_qparams(
        part_OI.amin(dims, keepdim=True).float(),
        part_OI.amax(dims, keepdim=True).float(),
        QType.of_weights(spec),
    )


def on_grid(x_OI: Tensor, scale: Tensor, zero_point: Tensor | None, spec: TensorSpec) -> Tensor:
    """The nearest points of the grid, in the dtype of x."""
    zero = 0 if zero_point is None else zero_point
    qtype = QType.of_weights(spec)
    return ((x_OI / scale).round() + zero).clamp(qtype.qmin, qtype.qmax).sub(zero) * scale


def textbook(weight_OI: Tensor, spec: TensorSpec, stats: LinearStats, config: GptqConfig) -> Tensor:
    """GPTQ as published, column by column in float64, through the Cholesky factor of the inverse."""
    gram_II = stats.gram_II.double()
    columns = torch.arange(len(gram_II))
    if config.act_order:
        columns = gram_II.diagonal().argsort(descending=True, stable=True)
    damped_II = gram_II + config.damping * gram_II.diagonal().mean() * torch.eye(len(gram_II))
    inverse_II = torch.linalg.inv(damped_II[columns][:, columns])
    factor_II = torch.linalg.cholesky(inverse_II, upper=True)
    size = spec.group_size or len(gram_II)
    fixed = [choose_range(part_OI, spec) for part_OI in parts(weight_OI, spec)]
    working_OI, what_OI = weight_OI.double()[:, columns], torch.zeros_like(weight_OI.double())
    for k, column in enumerate(columns.tolist()):
        if not config.static_groups and k % size == 0:
            fixed[k // size] = choose_range(working_OI[:, k : k + size], spec)
        now_OI = working_OI[:, k : k + 1]
        rounded_OI = on_grid(now_OI, *fixed[column // size], spec)
        what_OI[:, column : column + 1] = rounded_OI
        error_OI = (now_OI - rounded_OI) / factor_II[k, k]
        working_OI[:, k:] -= error_OI @ factor_II[k : k + 1, k:]
    return what_OI


@pytest.mark.parametrize("config", [DEFAULT, settings(act_order=False), DYNAMIC])
@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_layer_loss_is_that_of_the_textbook(spec, config):
    weight_OI, stats = random(OUTPUTS, INPUTS), stats_of(correlated())
    ours = loss(weight_OI, solve(weight_OI, spec, stats, config).dequantize(), stats)
    theirs = loss(weight_OI, textbook(weight_OI, spec, stats, config.gptq), stats)
    # Float32 sends a few values that lie midway between two codes to the other one.
    assert ours == pytest.approx(theirs, rel=3e-3)


@pytest.mark.parametrize("config", [DEFAULT, settings(act_order=False, block_size=48), DYNAMIC])
@pytest.mark.parametrize("outputs", [1, 7, 40])
def test_a_stack_of_specs_is_bit_for_bit_each_alone(outputs, config):
    weight_OI, stats = random(outputs, INPUTS), stats_of(correlated())
    together = quantize_weights(weight_OI, SPECS, stats, config=config)
    for name, spec, solved in zip(NAMES, SPECS, together, strict=True):
        (alone,) = quantize_weights(weight_OI, [spec], stats, config=config)
        assert torch.equal(solved.quantized.codes, alone.quantized.codes), name
        assert torch.equal(solved.quantized.scale, alone.quantized.scale), name
        assert (solved.quantized.zero_point is None) == spec.symmetric, name


@pytest.mark.parametrize("config", [DEFAULT, DYNAMIC])
@pytest.mark.parametrize("factor", [1.0, 2.0**66])
def test_outputs_are_solved_in_parts_bit_for_bit_as_at_once(factor, config, monkeypatch):
    weight_OI, stats = random(OUTPUTS, INPUTS) * factor, stats_of(correlated())
    whole = quantize_weights(weight_OI, SPECS, stats, config=config)
    monkeypatch.setattr(columns, "OUTPUTS", columns.LANES)
    for name, one, other in zip(
        NAMES, whole, quantize_weights(weight_OI, SPECS, stats, config=config), strict=True
    ):
        for part in ("codes", "scale", "zero_point"):
            ours, theirs = getattr(one.quantized, part), getattr(other.quantized, part)
            assert (ours is None and theirs is None) or torch.equal(ours, theirs), f"{name} {part}"


def test_parts_are_whole_vectors_so_that_padding_stays_at_the_end():
    assert columns.OUTPUTS % columns.LANES == 0


def test_the_same_spec_twice_is_the_same_answer_twice():
    weight_OI, stats = random(OUTPUTS, INPUTS), stats_of(correlated())
    first, other, again = quantize_weights(weight_OI, [SPECS[0], SPECS[4], SPECS[0]], stats)
    assert torch.equal(first.quantized.codes, again.quantized.codes)
    assert other.quantized.qtype.bits == 4


@pytest.mark.parametrize("config", [DEFAULT, DYNAMIC])
@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_loss_is_below_that_of_rtn(spec, config):
    for seed in range(3):
        weight_OI, stats = random(OUTPUTS, INPUTS, seed=seed), stats_of(correlated(seed=10 + seed))
        ours = loss(weight_OI, solve(weight_OI, spec, stats, config).dequantize(), stats)
        assert ours < 0.8 * loss(weight_OI, nearest(weight_OI, spec), stats)


@pytest.mark.parametrize("config", [DEFAULT, settings(act_order=False), DYNAMIC])
@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_where_nothing_correlates_it_is_rtn(spec, config):
    weight_OI, zero_I = random(OUTPUTS, INPUTS), torch.zeros(INPUTS)
    diagonal = LinearStats(torch.diag(torch.linspace(1, 9, INPUTS)), zero_I, zero_I, zero_I, TOKENS)
    ours = solve(weight_OI, spec, diagonal, config).dequantize()
    assert torch.equal(ours, nearest(weight_OI, spec))


def test_codes_scales_and_zero_points_have_their_shapes_and_lie_on_the_grid():
    for solved, spec in zip(
        quantize_weights(random(OUTPUTS, INPUTS), SPECS, stats_of(correlated())), SPECS, strict=True
    ):
        got, groups = solved.quantized, INPUTS // (spec.group_size or INPUTS)
        assert isinstance(got, QuantizedTensor) and got.qtype == QType.of_weights(spec)
        assert got.codes.shape == (OUTPUTS, INPUTS) and got.codes.dtype == got.qtype.dtype
        assert got.scale.shape == ((1, 1) if spec.granularity == "tensor" else (OUTPUTS, groups))
        assert got.codes.min() >= got.qtype.qmin and got.codes.max() <= got.qtype.qmax
        assert got.zero_point is None or (
            got.zero_point.shape == got.scale.shape and got.zero_point.dtype == torch.int32
        )


def test_every_code_is_the_nearest_to_a_target_so_scales_are_rounded_before_codes():
    weight_OI, stats = random(OUTPUTS, INPUTS), stats_of(correlated())
    (half,) = quantize_weights(weight_OI, [SPECS[4]], stats, scale_dtype=torch.float16)
    assert torch.equal(half.quantized.scale, half.quantized.scale.half().float())
    # On the exact grid with scales rounded afterwards the first channel, which has no feedback, may differ.
    first = int(stats.gram_II.diagonal().argmax())
    scale_O = half.quantized.scale[:, first // 16]
    assert torch.equal(
        half.quantized.codes[:, first], quantize(weight_OI[:, first], scale_O, None, half.quantized.qtype)
    )


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_block_size_does_not_matter_beyond_rounding(spec):
    weight_OI, stats = random(OUTPUTS, INPUTS), stats_of(correlated())
    losses = [
        loss(weight_OI, solve(weight_OI, spec, stats, settings(block_size=size)).dequantize(), stats)
        for size in (1, 5, 16, 64, 1000)
    ]
    assert max(losses) <= min(losses) * 1.003


def test_act_order_is_the_plain_order_of_channels_sorted_beforehand():
    weight_OI, stats = random(OUTPUTS, INPUTS), stats_of(correlated())
    order_I = stats.gram_II.diagonal().argsort(descending=True)
    sorted_II = stats.gram_II[order_I][:, order_I]
    sorted_stats = LinearStats(sorted_II, *([torch.zeros(INPUTS)] * 3), TOKENS)
    plain = solve(weight_OI[:, order_I], channel(4), sorted_stats, settings(act_order=False))
    ordered = solve(weight_OI, channel(4), stats)
    assert torch.equal(ordered.codes[:, order_I], plain.codes)
    assert not torch.equal(
        ordered.codes, solve(weight_OI, channel(4), stats, settings(act_order=False)).codes
    )


def test_the_same_input_gives_the_same_bytes():
    weight_OI, stats = random(OUTPUTS, INPUTS), stats_of(correlated())
    before = torch.random.get_rng_state()
    first, second = (quantize_weights(weight_OI, SPECS, stats) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.quantized.codes, b.quantized.codes)
    assert torch.equal(before, torch.random.get_rng_state())


def test_input_is_left_as_it_was():
    weight_OI, stats = random(OUTPUTS, INPUTS), stats_of(correlated())
    weight_before, gram_before = weight_OI.clone(), stats.gram_II.clone()
    quantize_weights(weight_OI, SPECS, stats)
    assert torch.equal(weight_OI, weight_before) and torch.equal(stats.gram_II, gram_before)


def notes(x_TI: Tensor, **gptq: object) -> str:
    return quantize_weights(random(OUTPUTS, INPUTS), [channel(4)], stats_of(x_TI), config=settings(**gptq))[
        0
    ].note


def test_an_undisturbed_run_has_no_note():
    assert notes(correlated()) == ""


@pytest.mark.parametrize("config", [DEFAULT, settings(act_order=False), DYNAMIC])
@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_dead_channels_change_nothing_and_take_their_nearest_codes(spec, config):
    x_TI, dead = correlated(), [3, 40]
    x_TI[:, dead] = 0
    stats = stats_of(x_TI)
    calm_OI, wild_OI = random(OUTPUTS, INPUTS), random(OUTPUTS, INPUTS)
    wild_OI[:, dead] *= 100
    (calm,), (wild,) = (quantize_weights(w_OI, [spec], stats, config=config) for w_OI in (calm_OI, wild_OI))
    assert "2 dead input channels" in calm.note
    alive = [i for i in range(INPUTS) if i not in dead]
    what_OI = wild.quantized.dequantize()
    # Scales are those of live weights, and so is the feedback.
    assert torch.equal(calm.quantized.dequantize()[:, alive], what_OI[:, alive])
    for weight_OI, got in ((calm_OI, calm.quantized), (wild_OI, wild.quantized)):
        assert torch.equal(got.codes[:, dead], direct_codes(weight_OI, got)[:, dead])


def direct_codes(weight_OI: Tensor, grid: QuantizedTensor) -> Tensor:
    """Codes without any feedback, on the grid of another matrix."""
    num_groups = grid.scale.shape[1]
    zero_point = None if grid.zero_point is None else grid.zero_point[..., None]
    groups = weight_OI.unflatten(1, (num_groups, -1))
    return quantize(groups, grid.scale[..., None], zero_point, grid.qtype).flatten(1)


def test_a_group_of_dead_channels_alone_still_has_a_range():
    x_TI = correlated()
    x_TI[:, 16:32] = 0
    weight_OI = random(OUTPUTS, INPUTS)
    for config in (DEFAULT, DYNAMIC):
        got = solve(weight_OI, group(4, 16), stats_of(x_TI), config)
        assert torch.equal(got.dequantize()[:, 16:32], nearest(weight_OI, group(4, 16))[:, 16:32])


def test_without_any_input_it_is_rtn_and_says_so():
    weight_OI = random(OUTPUTS, INPUTS)
    (solved,) = quantize_weights(
        weight_OI, [group(4, 16)], stats_of(torch.zeros(TOKENS, INPUTS)), config=settings(clip_steps=1)
    )
    assert torch.equal(solved.quantized.dequantize(), nearest(weight_OI, group(4, 16)))
    assert solved.note == UNSEEN


def test_too_few_tokens_are_said_and_still_beat_rtn_on_them():
    weight_OI, stats = random(OUTPUTS, INPUTS), stats_of(correlated(tokens=9))
    (solved,) = quantize_weights(weight_OI, [channel(4)], stats)
    assert solved.note == "gptq: 9 tokens for 64 input channels: rank-deficient"
    least = loss(weight_OI, nearest(weight_OI, channel(4)), stats)
    assert loss(weight_OI, solved.quantized.dequantize(), stats) < 0.5 * least


def test_one_token_is_enough_to_end_well():
    weight_OI, stats = random(OUTPUTS, INPUTS), stats_of(random(1, INPUTS))
    for solved in quantize_weights(weight_OI, SPECS, stats):
        assert solved.quantized.dequantize().isfinite().all() and "1 tokens for 64" in solved.note


def shifted(gram_II: Tensor, least: float) -> Tensor:
    """A symmetric matrix of mean diagonal 1 whose least eigenvalue is `least`, in float64."""
    values, vectors = torch.linalg.eigh(gram_II.double() / gram_II.diagonal().double().mean())
    values[0] = least
    return vectors @ torch.diag(values) @ vectors.T


def solved_from(gram_II: Tensor, **gptq: object) -> Solved:
    zero_I = torch.zeros(INPUTS)
    stats = LinearStats(gram_II, zero_I, zero_I, zero_I, TOKENS)
    weight_OI = random(OUTPUTS, INPUTS)
    return quantize_weights(weight_OI, [channel(4)], stats, config=settings(clip_steps=1, **gptq))[0]


@pytest.mark.parametrize(
    ("least", "note"),
    [
        (-0.005, ""),
        (-0.015, "gptq: damping raised to 0.02"),
        (-0.08, "gptq: damping raised to 0.1"),
        (-0.7, "gptq: damping raised to 1"),
        (-3.0, "rtn: X^T X is not positive definite at any damping"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ladder_stops_at_the_first_rung_that_holds(least, note, dtype):
    gram_II = shifted(stats_of(correlated()).gram_II, least)
    solved = solved_from(gram_II.to(dtype))
    assert solved.note == note
    if note.startswith("rtn"):
        weight_OI = random(OUTPUTS, INPUTS)
        assert torch.equal(solved.quantized.dequantize(), nearest(weight_OI, channel(4)))


def test_float64_is_tried_before_damping_is_raised():
    # Neighbours of an even Fibonacci number: a * c - b * b is 1, of 1e9 to 1e12, which float32 rounds away.
    fibonacci = [1, 1]
    while len(fibonacci) < 34:
        fibonacci.append(sum(fibonacci[-2:]))
    pairs = [torch.tensor([fibonacci[n - 2 : n], fibonacci[n - 1 : n + 1]]) for n in (24, 26, 28, 30, 32)]
    gram_II = torch.block_diag(*pairs, torch.eye(INPUTS - 2 * len(pairs))).double()
    assert solved_from(gram_II.float(), damping=1e-12).note == "gptq: float64 after a failed float32 Cholesky"


def test_a_configured_damping_is_the_first_rung():
    gram_II = shifted(stats_of(correlated()).gram_II, -0.08)
    assert solved_from(gram_II, damping=0.3).note == ""
    assert solved_from(gram_II, damping=0.06).note == "gptq: damping raised to 0.1"
    assert all(
        low < high for low, high in zip(hessian.RAISED_DAMPING, hessian.RAISED_DAMPING[1:], strict=False)
    )


def test_feedback_is_the_factor_that_its_formula_names():
    gram_II = stats_of(correlated().double()).gram_II
    upper_II = hessian.feedback_of(gram_II, damping=0.01, act_order=False).upper_II
    damped_II = gram_II / gram_II.diagonal().mean() + 0.01 * torch.eye(INPUTS, dtype=torch.float64)
    torch.testing.assert_close(upper_II, upper_II.triu())
    assert torch.equal(upper_II.diagonal(), torch.ones(INPUTS, dtype=torch.float64))
    inverse_II = torch.linalg.inv(upper_II)
    middle_II = inverse_II @ damped_II @ inverse_II.T
    torch.testing.assert_close(middle_II, torch.diag(middle_II.diagonal()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [DEFAULT, DYNAMIC])
@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
@pytest.mark.parametrize("fill", ["outlier", "zero", "constant", "tiny"])
def test_hard_weights_stay_finite_and_no_worse_than_rtn(fill, spec, config):
    weight_OI, stats = random(OUTPUTS, INPUTS), stats_of(correlated())
    if fill == "outlier":
        weight_OI[3, 5], weight_OI[4, 60] = 1e38, -1e38
    elif fill == "tiny":
        weight_OI *= 1e-36
    else:
        weight_OI[:, 8:32] = 0.0 if fill == "zero" else 0.7
        weight_OI[9] = 0.0 if fill == "zero" else -0.3
    got = solve(weight_OI, spec, stats, config).dequantize()
    assert got.isfinite().all()
    assert loss(weight_OI, got, stats) <= loss(weight_OI, nearest(weight_OI, spec), stats)


def test_large_inputs_are_the_same_inputs():
    weight_OI, x_TI = random(OUTPUTS, INPUTS), correlated()
    # A power of two scales exactly; the Gram matrix then reaches 1e38.
    for factor in (2.0**55, 2.0**-55):
        scaled = solve(weight_OI, channel(4), stats_of(x_TI * factor))
        assert torch.equal(scaled.codes, solve(weight_OI, channel(4), stats_of(x_TI)).codes)


def test_feedback_that_would_overflow_float32_is_computed_wider():
    weight_OI, stats = random(OUTPUTS, INPUTS), stats_of(correlated())
    for spec in (channel(2), group(2, 16)):
        calm, huge = (solve(weight_OI * factor, spec, stats).dequantize() for factor in (1.0, 2.0**125))
        # Half way between two codes float32 and float64 may part.
        assert loss(weight_OI, huge * 2.0**-125, stats) == pytest.approx(
            loss(weight_OI, calm, stats), rel=3e-3
        )


@pytest.mark.parametrize("config", [DEFAULT, DYNAMIC])
def test_the_loop_meets_whole_vectors_alone(config, monkeypatch):
    seen = []

    def spy(weight_IO, *rest):
        seen.append(weight_IO.shape[1])
        return columns.solve_columns(weight_IO, *rest)

    monkeypatch.setattr(gptq, "solve_columns", spy)
    for outputs in (1, 16, 40):
        quantize_weights(random(outputs, INPUTS), [group(4, 16)], stats_of(correlated()), config=config)
    assert seen == [16, 16, 48]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_named(bad):
    weight_OI, stats = random(OUTPUTS, INPUTS), stats_of(correlated())
    broken_OI = weight_OI.clone()
    broken_OI[2, 3] = bad
    with pytest.raises(SchemeError, match=rf"weights must be finite: found {bad} at \[2, 3\]"):
        quantize_weights(broken_OI, SPECS, stats)
    stats.gram_II[2, 3] = bad
    with pytest.raises(SchemeError, match=r"X\^T X must be finite: found NaN or infinity at input channel 3"):
        quantize_weights(weight_OI, SPECS, stats)


def test_what_cannot_be_honoured_is_refused():
    weight_OI, stats = random(OUTPUTS, INPUTS), stats_of(correlated())
    with pytest.raises(SchemeError, match="gptq needs calibration statistics"):
        quantize_weights(weight_OI, SPECS, None)
    with pytest.raises(SchemeError, match="group_size must divide"):
        quantize_weights(weight_OI, [group(4, 24)], stats)
    with pytest.raises(ConfigError, match=r"act_order needs static_groups"):
        quantize_weights(weight_OI, [group(4, 16)], stats, config=settings(static_groups=False))
    huge_OI = weight_OI * 1e30
    with pytest.raises(SchemeError, match="scales must fit"):
        quantize_weights(huge_OI, [group(4, 16)], stats, scale_dtype=torch.float16)


def test_channels_need_no_static_groups():
    weight_OI, stats = random(OUTPUTS, INPUTS), stats_of(correlated())
    moving = solve(weight_OI, channel(4), stats, settings(static_groups=False))
    assert torch.equal(moving.codes, solve(weight_OI, channel(4), stats).codes)


@pytest.mark.parametrize("config", [DEFAULT, DYNAMIC])
@pytest.mark.parametrize("spec", [channel(4), channel(3), group(3, 32), group(2, 32)])
def test_searched_ranges_lower_the_loss(spec, config):
    full, searched = 0.0, 0.0
    for seed in range(4):
        weight_OI, stats = random(OUTPUTS, INPUTS, seed=seed), stats_of(correlated(seed=20 + seed))
        (solved,) = quantize_weights(weight_OI, [spec], stats, config=config)
        searched += loss(weight_OI, solved.quantized.dequantize(), stats)
        full += loss(weight_OI, solve(weight_OI, spec, stats, config).dequantize(), stats)
    assert searched < full


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [DEFAULT, DYNAMIC])
def test_a_range_is_the_best_by_the_pivots_of_its_own_channels(config, scale_dtype):
    weight_OI, spec = random(OUTPUTS, INPUTS), group(3, 16)
    # Groups do not correlate, so that feedback leaves each group's weights as they are when its turn comes.
    blocks = [stats_of(correlated(inputs=16, seed=30 + g)).gram_II for g in range(4)]
    gram_II = torch.block_diag(*(block.flip(0, 1) if g % 2 else block for g, block in enumerate(blocks)))
    stats = LinearStats(gram_II, *([torch.zeros(INPUTS)] * 3), TOKENS)
    (solved,) = quantize_weights(weight_OI, [spec], stats, scale_dtype=scale_dtype, config=config)
    pivots_I = hessian.feedback_of(gram_II, damping=0.01, act_order=config.gptq.act_order).pivots_I.double()
    weight_OGg, pivots_Gg = weight_OI.double().unflatten(1, (4, 16)), pivots_I.unflatten(0, (4, 16))

    def error_of(scale_OG: Tensor) -> Tensor:
        scale = scale_OG.double()[..., None]
        residual = (weight_OGg / scale).round().clamp(-4, 3) * scale - weight_OGg
        return (pivots_Gg * residual.square()).sum(-1)

    absmax_OG, factors = weight_OGg.float().abs().amax(-1), torch.linspace(1, 1 - 1.4 / 3, 12).tolist()
    tried = [error_of((absmax_OG * factor / 3).to(scale_dtype)) for factor in factors]
    # Errors are compared in float32.
    assert (error_of(solved.quantized.scale) <= torch.stack(tried).amin(0) * (1 + 1e-5)).all()


def test_pivots_are_what_the_channels_after_leave_unexplained():
    gram_II = stats_of(correlated().double()).gram_II
    gram_II[7] = gram_II[:, 7] = 0
    feedback = hessian.feedback_of(gram_II, damping=0.01, act_order=True)
    live = feedback.order_I[:-1]
    assert feedback.order_I[-1] == 7 and feedback.pivots_I[7] == 0
    diagonal_I = gram_II.diagonal()[live]
    damped_II = gram_II[live][:, live] + 0.01 * diagonal_I.sum() / (INPUTS - 1) * torch.eye(INPUTS - 1)
    left = [1 / torch.linalg.inv(damped_II[k:, k:])[0, 0] for k in range(INPUTS - 1)]
    expected = torch.stack(left) / max(left)
    torch.testing.assert_close(feedback.pivots_I[live].double(), expected, rtol=1e-6, atol=0)
