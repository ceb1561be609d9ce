"""The parts of a training: order of blocks, learning rates, decay, equal starts, settings that are compared."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from quantlab.errors import ConfigError, DataError, OutputError
from quantlab.models.modeling import seeded_model
from quantlab.sections import build_section
from quantlab.train.blocks import EpochOrder, collate, held_out_blocks, train_blocks
from quantlab.train.checkpoints import Clock, last_whole, mark_whole
from quantlab.train.config import ScheduleConfig, TrainConfig, VariantConfig, load_train_config
from quantlab.train.corpus import Corpus, open_corpus
from quantlab.train.differences import first_difference
from quantlab.train.loop import Watcher
from quantlab.train.models import (
    baseline_config,
    count_parameters,
    initial_model,
    share_weights_,
    variant_config,
)
from quantlab.train.optimizing import adamw, learning_rates
from quantlab.train.plan import SETTINGS, plan
from tests.quantlab.corpora import corpus_tree, write_sources
from tests.toys import toy_model

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "train").glob("*.yaml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a built corpus."""
    folder = tmp_path_factory.mktemp("train")
    write_sources(folder / "sources")
    open_corpus(toy_config(folder).corpus)
    return folder


def toy_config(folder: Path, *overrides: str) -> TrainConfig:
    return build_section(TrainConfig, toy_tree(folder), overrides)


def toy_tree(folder: Path) -> dict[str, Any]:
    return {
        "out": str(folder / "out"),
        "corpus": corpus_tree(folder),
        "model": {
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
        },
        "variants": ["standard", "diff_v1", "diff_v2"],
        "schedule": {"tokens": 1280, "sequence_length": 32, "batch_size": 2, "warmup_steps": 3},
        "process": {"device": "cpu", "log_every": 2, "evaluate_every": 10, "checkpoint_every": 4},
    }


def _plan(config: TrainConfig) -> list[Any]:
    return plan(config, open_corpus(config.corpus), "cpu")


# ---- configurations


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_a_complete_training(path: Path) -> None:
    config = load_train_config(path)
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config
    assert all(source.licence for source in config.corpus.sources)
    assert not config.corpus.folder.is_absolute() and not config.corpus.out.is_absolute()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("schedule.learning_rate=1", "unknown key 'schedule.learning_rate'"),
        ("optimizer.learning_rat=1", "unknown key.*'learning_rate'"),
        ("corpus.sources.licens=x", "unknown key 'corpus.sources.0.licens'.*'licence'"),
        (
            "schedule={tokens: 9999, sequence_length: 2048, batch_size: 1}",
            "sequence_length 2048 must be at most max_position_embeddings 1024",
        ),
        ("schedule.tokens=63", "at least one step of 64"),
        ("process.checkpoint_every=3", r"checkpoint_every must be a multiple of log_every \(2\)"),
        ("seeds=[1, 1]", "seeds must differ"),
        ("variants=[standard, standard]", "needs a name of its own"),
        ("process.device=tpu", "'auto', 'cpu' or 'cuda'"),
    ],
)
def test_a_wrong_setting_is_one_sentence(folder: Path, override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        toy_config(folder, override)


def test_variants_are_names_or_have_options(folder: Path) -> None:
    config = toy_config(
        folder, "variants=[standard, {variant: diff_v1, options: {subln_affine: false}, name: bare}]"
    )
    assert [variant.title for variant in config.variants] == ["standard", "bare"]
    assert (
        variant_config(config.variants[1], baseline_config(config.model, 300)).options.subln_affine is False
    )


# ---- plans


def test_the_plan_names_what_is_trained_and_repeats(folder: Path) -> None:
    config = toy_config(folder, "seeds=[0, 7]")
    titles = [job.title for job in _plan(config)]
    assert titles == [f"{name}-seed{seed}" for seed in (0, 7) for name in ("standard", "diff_v1", "diff_v2")]
    assert [job.settings for job in _plan(config)] == [job.settings for job in _plan(config)]


@pytest.mark.parametrize(
    ("override", "error", "sentence"),
    [
        ("variants=[diff_v3]", ConfigError, r"found 'diff_v3'\. Did you mean 'diff_v[12]'"),
        ("variants=[{variant: diff_v1, options: {sublnaffine: true}}]", ConfigError, "subln_affine"),
        ("model.num_attention_heads=7", ConfigError, "num_attention_heads must divide hidden_size"),
        (
            "schedule={tokens: 9000, sequence_length: 9000, batch_size: 1}",
            DataError,
            "at least one block long",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_it_begins(
    folder: Path, override: str, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        _plan(toy_config(folder, f"out={folder / 'nothing'}", "model.max_position_embeddings=9000", override))
    assert not (folder / "nothing").exists()


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("schedule.floor=0.2", r"schedule\.floor = 0\.1, not 0\.2"),
        ("schedule.decay=linear", r"schedule\.decay = 'cosine', not 'linear'"),
        ("optimizer.learning_rate=0.001", r"optimizer\.learning_rate = 0\.002, not 0\.001"),
        ("process.precision=fp32", r"process\.precision = 'bf16', not 'fp32'"),
        ("model.intermediate_size=160", r"model\.intermediate_size = 128, not 160"),
    ],
)
def test_a_folder_of_another_config_is_refused_and_left_alone(
    folder: Path, tmp_path: Path, override: str, difference: str
) -> None:
    config = toy_config(folder, f"out={tmp_path}")
    job = _plan(config)[0]
    job.work.mkdir(parents=True)
    (job.work / SETTINGS).write_text(json.dumps(job.settings))
    _plan(toy_config(folder, f"out={tmp_path}", "process.workers=2", "process.max_seconds=5"))
    with pytest.raises(ConfigError, match=f"standard-seed0 has {difference}"):
        _plan(toy_config(folder, f"out={tmp_path}", override))
    assert json.loads((job.work / SETTINGS).read_text()) == job.settings


def test_a_foreign_or_unwritable_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "standard-seed0").mkdir()
    (tmp_path / "standard-seed0" / "mine").write_text("precious")
    with pytest.raises(OutputError, match="output folder exists"):
        _plan(toy_config(folder, f"out={tmp_path}"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="must be writable"):
        _plan(toy_config(folder, f"out={tmp_path / 'file'}"))
    assert (tmp_path / "standard-seed0" / "mine").read_text() == "precious"


def test_the_first_difference_is_named() -> None:
    assert first_difference({"a": {"b": (1, 2)}}, {"a": {"b": [1, 2]}}) == ""
    assert first_difference({"a": {"b": [1, 2], "c": 3}}, {"a": {"b": [1, 3], "c": 4}}) == "a.b.1 = 2, not 3"
    assert first_difference({"a": 1}, {"b": 1}) == "a = 1, not nothing"


# ---- blocks


def test_every_epoch_has_each_block_once_in_an_order_of_its_own() -> None:
    ids_N = np.arange(10 * 4 + 3, dtype=np.uint16)
    blocks = train_blocks(ids_N, 4, count=25, seed=3)
    starts = [int(blocks[i][0]) // 4 for i in range(25)]
    assert sorted(starts[:10]) == sorted(starts[10:20]) == list(range(10))
    assert starts[:10] != starts[10:20] and Counter(starts).most_common(1)[0][1] == 3
    assert torch.equal(blocks[0], torch.arange(4 * starts[0], 4 * starts[0] + 4))
    other = train_blocks(ids_N, 4, count=25, seed=4)
    assert starts[:10] != [int(other[i][0]) // 4 for i in range(10)]
    assert len(held_out_blocks(ids_N, 4)) == 10 and len(held_out_blocks(ids_N, 4, limit=3)) == 3
    batch = collate([blocks[0], blocks[1]])
    assert batch["input_ids"].shape == (2, 4) and batch["input_ids"].dtype == torch.int64


# ---- optimizer


def test_an_order_ends_after_its_draws() -> None:
    order = EpochOrder(3, 7, 0)
    assert sorted(list(order)[:6]) == [0, 0, 1, 1, 2, 2] and len(list(order)) == 7
    with pytest.raises(IndexError):
        order[7]


def test_annealed_layers_are_told_every_step(folder: Path) -> None:
    config = toy_config(folder)
    job = _plan(config)[0]
    model = toy_model("quantlab", variant="dex", variant_options={"anneal_steps": 10})
    watcher = Watcher(job, config, lambda event: None, None)
    watcher.on_step_begin(None, SimpleNamespace(global_step=4), None, model=model)
    assert [int(layer.self_attn.lambda_.step) for layer in model.model.layers] == [4, 4]


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_the_learning_rate_rises_peaks_and_ends_at_the_floor(decay: Any) -> None:
    config = ScheduleConfig(
        tokens=100, sequence_length=2, batch_size=1, warmup_steps=10, decay=decay, floor=0.2
    )
    rates = [learning_rates(config)(step) for step in range(config.steps)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.2) and rates[30] == pytest.approx(
        1 - 0.8 * (20 / 39 if decay == "linear" else (1 - np.cos(np.pi * 20 / 39)) / 2)
    )
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_only_matrices_decay(folder: Path) -> None:
    config = toy_config(folder)
    baseline = baseline_config(config.model, 300)
    for variant in config.variants:
        model = initial_model(variant, baseline, 0)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        decayed, free = adamw(model, config.optimizer).param_groups
        assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0.0
        assert all("proj" in names[id(parameter)] for parameter in decayed["params"])
        named = [names[id(parameter)] for parameter in free["params"]]
        assert any("embed_tokens" in name for name in named) and not any("mlp" in name for name in named)
        assert len(decayed["params"]) + len(free["params"]) == len(names)


# ---- models


def test_variants_start_equal_where_shapes_agree(folder: Path) -> None:
    config = toy_config(folder)
    baseline = baseline_config(config.model, 300)
    standard = initial_model(config.variants[0], baseline, 5).state_dict()
    for variant in config.variants[1:]:
        model = initial_model(variant, baseline, 5)
        own = model.state_dict()
        shared = share_weights_(model, initial_model(config.variants[0], baseline, 6))
        assert {"model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"} <= set(shared)
        fresh = initial_model(variant, baseline, 5).state_dict()
        assert all(torch.equal(fresh[name], standard[name]) for name in shared)
        assert not torch.equal(own["model.embed_tokens.weight"], fresh["model.embed_tokens.weight"])
        budget = count_parameters(initial_model(config.variants[0], baseline, 5))["total"]
        assert abs(count_parameters(model)["total"] / budget - 1) <= 0.01


def test_parameters_are_counted_once(folder: Path) -> None:
    model = seeded_model(baseline_config(toy_config(folder).model, 300), 0)
    counts = count_parameters(model)
    assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert counts["total"] - counts["non_embedding"] == 300 * 96


def test_the_callers_random_state_is_left_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    baseline = baseline_config(toy_config(folder).model, 300)
    first, second = (initial_model(VariantConfig(variant="diff_v1"), baseline, 1) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# ---- checkpoints


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    assert last_whole(tmp_path) is None
    for step in (8, 16, 24):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_text("half")
    mark_whole(tmp_path, 8)
    mark_whole(tmp_path, 16)
    assert last_whole(tmp_path) == tmp_path / "checkpoint-16"
    assert not (tmp_path / "checkpoint-24").exists()


def test_the_clock_goes_on(tmp_path: Path) -> None:
    clock = Clock(tmp_path)
    clock._began -= 100
    clock.keep()
    assert 200 > Clock(tmp_path).seconds >= 100


def test_a_corpus_can_be_read_without_its_sources(folder: Path) -> None:
    corpus = open_corpus(toy_config(folder, "corpus.folder=absent").corpus)
    assert isinstance(corpus, Corpus) and len(corpus.tokens("train")) > 2000
