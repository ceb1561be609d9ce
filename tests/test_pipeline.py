"""The main path on a toy model: what a score may not depend on, and what a record says."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantlab import checks, pipeline
from quantlab.config import RunConfig, build_config
from quantlab.errors import ConfigError, SchemeError
from quantlab.evaluation.tasks import TASKS
from quantlab.kernels import product
from quantlab.layers.linear import QuantLinear
from quantlab.machine import cpu
from quantlab.models.loading import Checkpoint, load_checkpoint
from quantlab.records import read_items, read_records, read_sidecar
from quantlab.schemes import Scheme
from quantlab.sweep.executors import Event
from quantlab.sweep.jobs import jobs_of
from quantlab.sweep.plan import Cell
from tests.toys import save_checkpoint

EVALUATION = {"hellaswag": {"limit": 9}, "perplexity": {"sequence_length": 40, "num_sequences": 5}}


def _config(folder: Path, **evaluation: Any) -> RunConfig:
    return build_config({"checkpoints": [{"path": str(folder)}], "evaluation": EVALUATION | evaluation})


def watch_nothing(cells: Sequence[Cell]) -> Callable[[Event], None]:
    """A run without progress."""
    return lambda event: None


@pytest.fixture(scope="module")
def checkpoint(toy_folder: Path) -> Checkpoint:
    return load_checkpoint(_config(toy_folder).checkpoints[0])


def _scores(checkpoint: Checkpoint, config: RunConfig, scheme: str) -> list[np.ndarray]:
    """Log-likelihoods of all endings, and nats of all blocks."""
    _, items = pipeline.evaluate_cell(checkpoint, Scheme.parse(scheme), config, lambda units: None)
    endings = [items["hellaswag"][f"ll_{ending}"] for ending in range(4)]
    return [np.stack(endings), items["perplexity"]["nats"]]


@pytest.mark.parametrize("scheme", ["w8a8", "w4a4", "w4g32a8", "a8t", "l8t", "l4h", "l6r", "p6t", "w4a8l6t"])
def test_batch_size_changes_no_bit_of_a_scheme_that_rounds_values(
    scheme: str, checkpoint: Checkpoint, toy_folder: Path
) -> None:
    one, many = (_scores(checkpoint, _config(toy_folder, batch_size=size), scheme) for size in (1, 4))
    for alone, together in zip(one, many, strict=True):
        np.testing.assert_array_equal(alone, together)


@pytest.mark.parametrize("scheme", ["w16", "w8", "w4g32"])
def test_batch_size_changes_other_schemes_by_rounding_only(
    scheme: str, checkpoint: Checkpoint, toy_folder: Path
) -> None:
    one, many = (_scores(checkpoint, _config(toy_folder, batch_size=size), scheme) for size in (1, 4))
    for alone, together in zip(one, many, strict=True):
        # a score is a sum of up to 60 log-probabilities of float32 logits of magnitude about 10
        np.testing.assert_allclose(
            together, alone, rtol=0, atol=60 * 10 * 16 * float(np.finfo(np.float32).eps)
        )


def test_selection_and_order_change_no_score(checkpoint: Checkpoint, toy_folder: Path) -> None:
    some = build_config(
        {
            "checkpoints": [{"path": str(toy_folder)}],
            "evaluation": {"tasks": ["hellaswag"], "hellaswag": {"items": "3:9"}},
        }
    )
    fewer = build_config(
        {
            "checkpoints": [{"path": str(toy_folder)}],
            "evaluation": {"tasks": ["hellaswag"], "hellaswag": {"items": "5:7"}},
        }
    )
    found = []
    for config in (some, fewer):
        _, items = pipeline.evaluate_cell(checkpoint, Scheme.parse("w8a8l6t"), config, lambda units: None)
        found.append(dict(zip(items["hellaswag"]["item"], items["hellaswag"]["ll_2"], strict=True)))
    assert found[1].keys() == {5, 6} and found[1].items() <= found[0].items()


def test_a_record_says_what_made_it(toy_folder: Path, tmp_path: Path) -> None:
    config = build_config(
        {
            "checkpoints": [{"path": str(toy_folder)}],
            "schemes": ["w4g32"],
            "profile": None,
            "out": str(tmp_path),
        }
        | {"evaluation": EVALUATION, "quantize": {"skip": ["*.down_proj"]}}
    )
    baseline, record = pipeline.run(config, watch_nothing)
    assert (baseline.made_by["scheme"], record.made_by["scheme"]) == ("w16", "w4g32")
    assert record.made_by["quantize"]["skip"] == ["*.down_proj"]
    shares = record.result["quantization"]["share_by_bits"]
    assert 0 < shares["4"] < 1 and sum(shares.values()) == pytest.approx(1)
    assert record.config == config.recorded() and record.config_fingerprint
    items = read_items(tmp_path, record.key, "hellaswag")
    assert items["correct"].mean() == record.result["hellaswag"]["acc"]
    assert len(items) == 9 and items["item"].is_monotonic_increasing
    assert pipeline.run(config, lambda cells: pytest.fail("computed again") if cells else lambda event: None)


def test_machine_and_backend_stand_beside_the_record_and_not_in_it(
    tmp_path: Path, toy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another backend gives another sidecar, and the same record byte for byte."""
    tree = {"checkpoints": [{"path": str(toy_folder)}], "schemes": ["w8a8"], "profile": None}
    found = []
    for backend in ("float32", "native"):
        monkeypatch.setattr(product, "_choose", lambda *_, backend=backend: backend)
        run = tmp_path / backend
        config = build_config(tree | {"out": str(run), "evaluation": EVALUATION | {"tasks": ["hellaswag"]}})
        baseline, integers = pipeline.run(config, watch_nothing)
        assert "integer_product" not in read_sidecar(run, baseline.key)
        notes = read_sidecar(run, integers.key)
        assert notes["integer_product"] == backend
        assert notes["cpu"] == cpu() | {
            "torch": torch.backends.cpu.get_cpu_capability(),
            "onednn": torch.backends.mkldnn.enabled,
        }
        found.append((run / "records" / f"{integers.key}.json").read_bytes())
    if product.native_is_exact(torch.device("cpu")):
        assert found[0] == found[1]


def test_scores_are_of_the_codes_that_are_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16 checkpoint ships bfloat16 scales, so its schemes are scored with bfloat16 scales, in float32 too."""
    folder = save_checkpoint("llama", tmp_path / "bf16", dtype="bfloat16")
    shipped = tmp_path / "w4g32"
    config = build_config(
        {
            "checkpoints": [{"path": str(folder)}],
            "schemes": ["w4g32"],
            "profile": None,
            "evaluation": EVALUATION,
        }
        | {"export": {"scheme": "w4g32", "out": str(shipped)}, "out": str(tmp_path / "run")}
    )
    scored: dict[str, torch.Tensor] = {}

    def remember(checkpoint: Checkpoint, *_: object) -> Any:
        scored.update({name: module.weight.clone() for name, module in _quant_linears(checkpoint)})
        return perplexity(checkpoint, *_)

    perplexity = TASKS["perplexity"]
    monkeypatch.setitem(TASKS, "perplexity", remember)
    _, record = pipeline.run(config, watch_nothing)
    assert record.made_by["quantize"]["scale_dtype"] == "bfloat16"
    pipeline.export(config, lambda count: None)
    reloaded = load_checkpoint(config.checkpoints[0].model_copy(update={"path": str(shipped)})).model
    assert len(scored) == 2 * 7
    for name, weight in scored.items():
        # codes times bfloat16 scales are exact in float32; the reader multiplies in bfloat16, which rounds them once
        assert torch.equal(reloaded.get_submodule(name).weight, weight.bfloat16().float()), name


def _quant_linears(checkpoint: Checkpoint) -> list[tuple[str, QuantLinear]]:
    return [
        (name, module) for name, module in checkpoint.model.named_modules() if isinstance(module, QuantLinear)
    ]


def test_a_copy_under_another_name_has_the_same_records(toy_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(toy_folder, copy)
    tree = {"evaluation": EVALUATION, "profile": None, "out": str(tmp_path / "run")}
    (record,) = pipeline.run(build_config(tree | {"checkpoints": [{"path": str(toy_folder)}]}), watch_nothing)
    again = build_config(tree | {"checkpoints": [{"path": str(copy)}]})
    (same,) = pipeline.run(
        again, lambda cells: pytest.fail("computed again") if cells else lambda event: None
    )
    assert same == record


def test_verbs_share_a_folder_without_losing_each_other(toy_folder: Path, tmp_path: Path) -> None:
    tree = {"checkpoints": [{"path": str(toy_folder)}], "evaluation": EVALUATION, "out": str(tmp_path)}
    config = build_config(tree | {"profile": {"text": EVALUATION["perplexity"]}, "schemes": ["w8"]})
    for _ in range(2):
        (scores,) = pipeline.run(config, watch_nothing, only=("evaluation", "w8"))
    (outliers,) = pipeline.run(config, watch_nothing, only=("profile", "w16"))
    # A profile sees logits through the sites, a scheme of weights leaves attention to the model's own kernel.
    assert outliers.result["attention"].endswith("with sites") and "sites" not in scores.result["attention"]
    assert [record.key for record in read_records(tmp_path)] == [scores.key, outliers.key]


def test_a_damaged_neighbour_spoils_no_other_record(toy_folder: Path, tmp_path: Path) -> None:
    tree = {"checkpoints": [{"path": str(toy_folder)}], "evaluation": EVALUATION, "profile": None}
    config = build_config(tree | {"schemes": ["w8"], "out": str(tmp_path)})
    baseline, neighbour = pipeline.run(config, watch_nothing)
    with (tmp_path / "records" / f"{neighbour.key}.parquet").open("ab") as file:
        file.write(b"!")
    assert pipeline.run(config, watch_nothing, only=("evaluation", "w16")) == [baseline]
    assert pipeline.run(config, watch_nothing)[1] == neighbour


def test_nothing_to_compute_is_an_error(toy_folder: Path, tmp_path: Path) -> None:
    config = build_config(
        {
            "checkpoints": [{"path": str(toy_folder)}],
            "profile": None,
            "evaluation": None,
            "out": str(tmp_path),
        }
    )
    with pytest.raises(ConfigError, match="must have something to compute"):
        pipeline.run(config, watch_nothing)
    with pytest.raises(ConfigError, match="needs the section 'export'"):
        pipeline.export(config, lambda count: None)


CALIBRATION = {"text": {"num_sequences": 3, "sequence_length": 24}}


def test_a_calibrated_scheme_says_what_made_it_and_is_solved_once(toy_folder: Path, tmp_path: Path) -> None:
    config = build_config(
        {
            "checkpoints": [{"path": str(toy_folder)}],
            "schemes": ["w3-gptq", "w4g32-gptq", "w4g32a8-gptq", "a8ts"],
            "profile": None,
            "out": str(tmp_path / "run"),
            "evaluation": EVALUATION,
            "calibration": CALIBRATION | {"cache": str(tmp_path / "calibration")},
        }
    )
    baseline, *records = pipeline.run(config, watch_nothing)
    assert "calibration" not in baseline.made_by and "calibration" not in baseline.result
    for record in records:
        assert record.made_by["calibration"]["text"]["num_sequences"] == 3
        assert record.result["calibration"]["num_tokens"] == 3 * 24
    assert records[0].made_by["method"]["hessian"] == "shared" and "method" not in records[3].made_by
    # two grids of weights, three schemes
    assert len(list((tmp_path / "run" / "solutions").glob("w*"))) == 2
    assert len(list((tmp_path / "calibration").glob("[0-9a-f]*"))) == 1
    other = config.model_copy(
        update={"calibration": config.calibration.model_copy(update={"accumulate": "float64"})}
    )
    keys = {record.key for record in records}
    assert not keys & {record.key for record in pipeline.run(other, watch_nothing)[1:]}


def test_a_setting_of_methods_changes_the_keys_of_its_own_schemes_only(toy_folder: Path) -> None:
    reading = ["w4-bias", "w4a8ts", "w4z-hqq-bias", "a8ts"]

    def keys(**quantize: Any) -> list[str]:
        config = build_config(
            {
                "checkpoints": [{"path": str(toy_folder)}],
                "schemes": ["w4", "w4-gptq", "w4-awq", "w4-rotate", "w4-mixed", *reading],
                "profile": None,
                "evaluation": EVALUATION,
                "quantize": {"widths": {"*.o_proj": "w8"}} | quantize,
            }
        )
        infos, data, documents = checks.check(config)
        return [job.key for job in jobs_of(config, infos, data, documents)][1:]

    plain = keys()
    changes = [
        ({"methods": {"gptq": {"damping": 0.05}}}, [1]),
        ({"methods": {"awq": {"clip": False}}}, [2]),
        # biases and static scales of models with quantized weights follow it too
        ({"methods": {"hessian": "sequential"}}, [1, 2, 5, 6, 7]),
        ({"transforms": {"rotate_seed": 1}}, [3]),
        ({"widths": {"*.v_proj": "w8"}}, [4]),
    ]
    for quantize, changed in changes:
        found = keys(**quantize)
        assert [index for index in range(9) if found[index] != plain[index]] == changed, quantize


def test_calibration_and_perplexity_take_different_texts(toy_folder: Path) -> None:
    config = build_config(
        {
            "checkpoints": [{"path": str(toy_folder)}],
            "schemes": ["w4-gptq"],
            "evaluation": EVALUATION,
            "calibration": {"text": {"path": None}},
        }
    )
    with pytest.raises(
        ConfigError, match="calibration must not read the text that perplexity is measured on"
    ):
        checks.check(config)
    checks.check(config.model_copy(update={"schemes": ("w16", "w4")}))


def test_outlier_columns_are_reported(checkpoint: Checkpoint, toy_folder: Path) -> None:
    """An input channel of the first layer's q, k and v that its norm makes large is found in every sequence."""
    weight = checkpoint.model.model.layers[0].input_layernorm.weight
    kept = weight.data.clone()
    try:
        weight.data[5] = 1e3
        result, _ = pipeline.evaluate_cell(
            checkpoint, Scheme.parse("llm_int8"), _config(toy_folder), lambda units: None
        )
    finally:
        weight.data.copy_(kept)
    found = result["outlier_columns"]
    assert len(found) == 14
    q = found["model.layers.0.self_attn.q_proj"]
    # four endings of nine documents, each with its context by itself, and five blocks of text
    assert q["sequences"] == 4 * 9 + 5 and 1 <= q["mean"] <= q["most"]


def test_what_was_read_of_the_cache_is_recorded_and_nothing_is_refused(
    checkpoint: Checkpoint, toy_folder: Path
) -> None:
    config = _config(toy_folder)
    result, _ = pipeline.evaluate_cell(checkpoint, Scheme.parse("kv4u4"), config, lambda units: None)
    assert list(result["cached_share"]) == ["hellaswag", "perplexity"]
    assert all(0 < share < 1 for share in result["cached_share"].values())
    with pytest.raises(SchemeError, match=r"kv4u4000 leaves the last 4000 .*: none of hellaswag is"):
        pipeline.evaluate_cell(checkpoint, Scheme.parse("kv4u4000"), config, lambda units: None)


WIDTHS = [
    ({"widths": {"*.v_proj": "w8"}}, ["w4"], r"for schemes whose name ends in -mixed: the run has none"),
    ({}, ["w4-mixed"], r"from quantize.widths: it is empty"),
    ({"widths": {"*.vproj": "w8"}}, ["w4-mixed"], r"'\*.vproj' matches none"),
    ({"widths": {"*": "w16"}}, ["w4-mixed"], r"leaves all of w4-mixed at 16 bits"),
    ({"widths": {"*.v_proj": "w8"}}, ["w4z-hqq-mixed"], r"a symmetric grid has none"),
    ({"widths": {"*.v_proj": "w8g48"}}, ["w4-mixed"], r"group_size=48"),
]


@pytest.mark.parametrize(("quantize", "schemes", "message"), WIDTHS)
def test_widths_that_cannot_be_taken_are_refused_before_anything_is_loaded(
    quantize: dict[str, Any], schemes: list[str], message: str, toy_folder: Path
) -> None:
    config = build_config(
        {"checkpoints": [{"path": str(toy_folder)}], "schemes": schemes, "quantize": quantize}
        | {"evaluation": EVALUATION}
    )
    with pytest.raises((ConfigError, SchemeError), match=message):
        checks.check(config)
