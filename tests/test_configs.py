"""Every file under configs/ is a complete run; unknown keys and values are answered in one sentence."""

import ast
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from quantlab.config import RunConfig, build_config, load_config
from quantlab.errors import ConfigError, SchemeError
from quantlab.records import fingerprint

ROOT = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(path for path in ROOT.rglob("*.yaml") if path.relative_to(ROOT).parts[0] != "train")
"""Every run; trainings are loaded by the tests of quantlab.train."""
SOURCES = sorted((ROOT.parent / "quantlab").rglob("*.py"))
MINIMAL = {"checkpoints": [{"path": "model"}]}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_is_a_complete_run(path: Path) -> None:
    config = load_config(path)
    assert config.checkpoints and config.schemes[0] == "w16"
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_the_demo_names_its_documents() -> None:
    demo = load_config(next(path for path in CONFIGS if path.stem == "demo"))
    assert demo.evaluation is not None
    assert (demo.evaluation.hellaswag.limit or 0) >= 64
    assert (demo.sweep.workers, demo.sweep.threads) == (2, 1)


def test_the_demo_shows_the_pair_first_and_ships_the_reference() -> None:
    demo = load_config(next(path for path in CONFIGS if path.stem == "demo"))
    paths = [checkpoint.path for checkpoint in demo.checkpoints]
    assert demo.compare is not None and paths[:3] == [demo.compare.baseline, *demo.compare.against]
    assert demo.exported == 3 and "SmolLM2" in paths[3]


@pytest.mark.parametrize("name", ["table5", "figure8"])
def test_the_papers_runs_take_another_pair(name: str) -> None:
    path = next(path for path in CONFIGS if path.stem == name)
    pair = ["checkpoints=[{path: A}, {path: B}]", "compare={baseline: A, against: [B]}"]
    config = load_config(path, pair)
    assert config.compare is not None and config.compare.against == ("B",)
    with pytest.raises(ConfigError, match="is not there"):
        load_config(path, pair[:1])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("profile.text.sequence_lenght=4", "unknown key 'profile.text.sequence_lenght'.*'sequence_length'"),
        ("evaluation.batchsize=4", "unknown key.*'batch_size'"),
        ("profile.statistics=[kurtossis]", "unknown statistic 'kurtossis'. Did you mean 'kurtosis'"),
        ("evaluation.batch_size=0", "batch_size must be at least 1 or 'auto'; found 0"),
        ("evaluation.hellaswag={limit: 4, items: '0:4'}", "limit or items, not both"),
        ("evaluation.tasks=[arc]", "'hellaswag' or 'perplexity'"),
        ("sweep.workers=0", "sweep.workers.*greater than or equal to 1"),
        ("checkpoints.device=tpu", "checkpoints.0.device"),
        ("name.first=4", "names no key"),
        ("nonsense", "takes section.key=value"),
        ("name=[", "takes a YAML value"),
    ],
)
def test_a_wrong_override_is_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build_config(MINIMAL | {"name": "x"}, [override])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("- a", "must hold a mapping"), ("a: [", "must be YAML"), ("name: x", "'checkpoints' is missing")],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load_config(path)
    with pytest.raises(ConfigError, match="must be readable"):
        load_config(tmp_path / "absent.yaml")


def test_an_override_reaches_every_checkpoint_and_makes_a_section() -> None:
    tree = {"checkpoints": [{"path": "a"}, {"path": "b"}], "profile": None}
    config = build_config(tree, ["checkpoints.dtype=bfloat16", "profile.top_k=200"])
    assert [checkpoint.dtype for checkpoint in config.checkpoints] == ["bfloat16", "bfloat16"]
    assert config.profile is not None and config.profile.top_k == 200


PAIR = {"checkpoints": [{"path": "a"}, {"path": "b"}, {"path": "far/c", "limit": 8, "schemes": ["w4"]}]}


def test_a_compared_checkpoint_stands_once() -> None:
    twice = {"checkpoints": [{"path": "a"}, {"path": "a", "dtype": "bfloat16"}, {"path": "b"}]}
    with pytest.raises(ConfigError, match="must stand once under 'checkpoints': 'a' stands twice"):
        build_config(twice | {"compare": {"baseline": "a", "against": ["b"]}}, where="x")


@pytest.mark.parametrize(
    ("compare", "sentence"),
    [
        ({"baseline": "a", "against": ["bb"]}, "compare in x: .*'bb' is not there. Did you mean 'b'"),
        ({"baseline": "zzz", "against": ["b"]}, "'zzz' is not there. There are a, b, far/c"),
        ({"baseline": "a", "against": ["b", "a"]}, "must name different checkpoints"),
        ({"baseline": "a", "against": []}, "compare.against"),
        ({"baseline": "a", "against": ["b"], "agianst": 1}, "unknown key 'compare.agianst'.*'against'"),
    ],
)
def test_a_comparison_names_checkpoints_of_the_run(compare: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build_config(PAIR | {"compare": compare}, where="x")


def test_a_comparison_is_recorded() -> None:
    config = build_config(PAIR | {"compare": {"baseline": "a", "against": ["b"]}})
    assert config.recorded()["compare"] == {"baseline": "a", "against": ["b"]}


def test_a_checkpoint_may_have_schemes_and_sizes_of_its_own() -> None:
    tree = PAIR | {"schemes": ["w8"], "evaluation": {"hellaswag": {"limit": 64}}}
    config = build_config(tree, ["checkpoints.num_sequences=3"])
    runs = [config.of(position) for position in range(3)]
    assert [run.schemes for run in runs] == [("w16", "w8"), ("w16", "w8"), ("w16", "w4")]
    sizes = [
        (run.evaluation.hellaswag.limit, run.evaluation.perplexity.num_sequences)
        for run in runs
        if run.evaluation
    ]
    assert sizes == [(64, 3), (64, 3), (8, 3)]
    assert config.evaluation is not None and config.evaluation.hellaswag.limit == 64
    with pytest.raises(ConfigError, match=r"a checkpoint's limit or hellaswag\.items, not both"):
        build_config(tree, ["evaluation.hellaswag={items: '0:4'}"])


def test_an_export_names_a_checkpoint_of_the_run() -> None:
    config = build_config(PAIR | {"export": {"scheme": "w4", "checkpoint": "b"}})
    assert config.exported == 1 and build_config(PAIR | {"export": {"scheme": "w4"}}).exported == 0
    with pytest.raises(ConfigError, match=r"'far/d' is not there\. Did you mean 'far/c'"):
        build_config(PAIR | {"export": {"scheme": "w4", "checkpoint": "far/d"}})


def test_schemes_become_canonical_and_start_with_the_baseline() -> None:
    assert build_config(MINIMAL | {"schemes": ["W4A16-g64", "l8", "w4g64"]}).schemes == (
        "w16",
        "w4g64",
        "l8t",
    )
    with pytest.raises(SchemeError):
        build_config(MINIMAL | {"schemes": ["w99"]})


def test_the_fingerprint_tells_configs_apart() -> None:
    first, second = build_config(MINIMAL), build_config(MINIMAL, ["evaluation.hellaswag.limit=3"])
    assert fingerprint(first.model_dump(mode="json")) != fingerprint(second.model_dump(mode="json"))


def _sections(section: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Fields of a section that are sections themselves."""
    kinds = {
        name: [field.annotation, *getattr(field.annotation, "__args__", ())]
        for name, field in section.model_fields.items()
    }
    return {
        name: kind
        for name, choices in kinds.items()
        for kind in choices
        if isinstance(kind, type) and issubclass(kind, BaseModel)
    }


def _keys(section: type[BaseModel], before: str = "") -> set[str]:
    """Every dotted key that `--set` takes."""
    own = {before + name for name in section.model_fields}
    return own.union(*(_keys(inner, f"{before}{name}.") for name, inner in _sections(section).items()))


def _sentences(path: Path) -> list[str]:
    """Strings of a source file that are sentences or parts of one; docstrings are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in said]
    return [node.value for node in constants if isinstance(node.value, str) and " " in node.value]


def test_keys_that_errors_advise_exist() -> None:
    keys = _keys(RunConfig)
    parts = {part for key in keys for part in key.split(".")[:-1]}
    dotted = re.compile(rf"(?<![\w./-])(?:{'|'.join(sorted(parts))})(?:\.[a-z_]+)+(?![\w(])")
    named = {key for path in SOURCES for text in _sentences(path) for key in dotted.findall(text)}
    assert "quantize.transforms.spin_sequences" in named
    files = {"hellaswag.items"}
    assert not named - keys - files
