"""Bad config.json, tokenizers, templates and values: what a checkpoint says of itself (B9-B15, B17, B20, B22-B27, B30)."""

# ruff: noqa: E501  a case, a line

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.case import (
    CONFIG,
    WEIGHTS,
    Case,
    Damage,
    both,
    changed,
    configured,
    linked,
    sparse,
    without,
    written,
)
from tests.hostile.tensors import added, poked, replaced, reweighted

SPY = "import pathlib; pathlib.Path(__file__).parent.parent.joinpath('canary').touch()\n"
"""A module that leaves its mark when it is imported."""

TEMPLATE = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in ().__class__.__base__.__subclasses__() %}"
    "{% if 'warning' in x.__name__ %}{{x()._module.__builtins__['__import__']('os').system('touch canary')}}{% endif %}{% endfor %}"
)


def spied(name: str = "modeling_evil.py") -> Damage:
    """Python files in the folder that must not run."""
    return written(name, SPY + "class Evil: pass\n")


def raw(text: str | bytes) -> Damage:
    return written(CONFIG, text)


def tokenized(**changes: Any) -> Damage:
    return changed("tokenizer_config.json", **changes)


def retokenized(change: Any) -> Damage:
    """Change tokenizer.json."""

    def damage(it: Path) -> None:
        tree = json.loads((it / "tokenizer.json").read_text())
        change(tree)
        (it / "tokenizer.json").write_text(json.dumps(tree))

    return damage


def _more_tokens(tree: dict[str, Any]) -> None:
    """The tokens of the first thousand ids are moved past the embedding."""
    vocabulary = tree["model"]["vocab"]
    for token in vocabulary:
        vocabulary[token] += 1000


SIZES = [
    Case("layers 1e7", "B9", configured(num_hidden_layers=10**7), "num_hidden_layers must be 1 to 10000"),
    Case("layers 9,999", "B9", configured(num_hidden_layers=9999), "layer 2 is missing"),
    Case("layers 0", "B9", configured(num_hidden_layers=0), "num_hidden_layers must be"),
    Case("layers 2.0", "B9", configured(num_hidden_layers=2.0), "must be a whole number"),
    Case("layers 1e400", "B9", raw('{"model_type": "llama", "num_hidden_layers": 1e400}'), "must be a whole number|must be finite"),
    Case("layers NaN", "B9", configured(num_hidden_layers=float("nan")), "must be a whole number|must be finite"),
    Case("vocab 1e12", "B9", configured(vocab_size=10**12), "vocab_size must be"),
    Case("vocab 9,000,000", "B9", configured(vocab_size=9_000_000), "tensors must agree with the config"),
    Case("positions 1e12", "B9", configured(max_position_embeddings=10**12), "max_position_embeddings must be"),
    Case("hidden -8", "B9", configured(hidden_size=-8), "hidden_size must be"),
    Case("hidden 2^70", "B9", configured(hidden_size=2**70), "hidden_size must be"),
    Case("heads 0", "B9", configured(num_attention_heads=0), "num_attention_heads must be"),
    Case("heads do not divide", "B9", configured(num_attention_heads=5, head_dim=None, num_key_value_heads=None), "must divide hidden_size"),
    Case("key heads do not divide", "B9", configured(num_key_value_heads=3), "must divide num_attention_heads"),
    Case("rope as text", "B9", configured(rope_parameters="linear"), "must be an object or null"),
    Case("rope scaling as text", "B9", configured(rope_scaling="linear"), "must be an object or null"),
    Case("rope factor 0", "B9", configured(rope_parameters={"rope_type": "linear", "factor": 0.0, "rope_theta": 1e4}),
         "cannot be loaded|must be finite", loads=True),
    Case("rope of no known type", "B9", configured(rope_parameters={"rope_type": "evil", "rope_theta": 1e4}), "cannot be loaded", loads=True),
    Case("rope theta as text", "B9", configured(rope_parameters={"rope_type": "default", "rope_theta": "x"}), "cannot be loaded", loads=True),
    Case("rope theta 0", "B9", configured(rope_parameters={"rope_type": "default", "rope_theta": 0.0}), "cannot be loaded|finite", loads=True),
    Case("labels 1e9", "B9", configured(num_labels=10**9), "num_labels must be"),
    Case("labels 1e9 in text_config", "B9", configured(text_config={"num_labels": 10**9}), "num_labels must be"),
    Case("layers 1e7 in text_config", "B9", configured(text_config={"num_hidden_layers": 10**7}), "num_hidden_layers must be"),
    Case("text_config in text_config", "B9", configured(text_config={"text_config": {"num_hidden_layers": 10**7}}), "num_hidden_layers must be"),
    Case("positions that make a mask of 40 GB", "B9", configured(n_positions=200_000), "tensors must agree|buffers", base="gpt2"),
    Case("head_dim 99,999 and unknown projections", "B9", configured(head_dim=99_999), "tensors must agree with the config"),
    Case("experts 90,000", "B9", configured(model_type="qwen3_moe", num_experts=90_000), "num_experts"),
    Case("layer types of another number", "B9", configured(model_type="qwen2", layer_types=["full_attention"]), "cannot be loaded", loads=True),
    Case("inner sizes of a million", "B9", configured(intermediate_size=[96] * 1_000_000), "intermediate_size|lists more"),
    Case("activation unknown", "B9", configured(hidden_act="__import__('os').system"), "cannot be loaded", loads=True),
    Case("dtype os", "B9", configured(dtype="os"), "dtype must be"),
    Case("dtype __builtins__", "B9", configured(torch_dtype="__builtins__"), "dtype must be"),
    Case("epsilon as text", "B9", configured(rms_norm_eps="1e-6"), "cannot be loaded", loads=True),
    Case("epsilon NaN", "B9 B25", configured(rms_norm_eps=float("nan")), "must be finite"),
    Case("tie_word_embeddings as text", "B9", configured(tie_word_embeddings="yes"), "cannot be loaded", loads=True),
    Case("quantization_config as text", "B9", configured(quantization_config="evil"), "was quantized by 'evil'"),
    Case("quantization_config of gptq", "B9", configured(quantization_config={"quant_method": "gptq", "bits": 4}), "was quantized by 'gptq'"),
    Case("quantization_config nested", "B9", configured(text_config={"quantization_config": {"quant_method": "gptq"}}), "was quantized by|must not set"),
]  # fmt: skip

CODE = [
    Case("auto_map", "B10", both(spied(), configured(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"})),
         "run code of its own"),
    Case("auto_map empty", "B10", configured(auto_map={}), "run code of its own"),
    Case("auto_map of another repository", "B10", configured(auto_map={"AutoModelForCausalLM": "evil/repo--modeling.Evil"}), "run code of its own"),
    Case("auto_map of an unknown architecture", "B10 B14", both(spied(), configured(model_type="evil", auto_map={"AutoConfig": "modeling_evil.Evil"})),
         "run code of its own"),
    Case("auto_map in text_config", "B9 B10", both(spied(), configured(text_config={"auto_map": {"AutoConfig": "modeling_evil.Evil"}})),
         "run code of its own"),
    Case("auto_map in quantization_config", "B9 B10", both(spied(), configured(quantization_config={
         "quant_method": "compressed-tensors", "config_groups": {}, "auto_map": {"a": "b"}})), "run code of its own"),
    Case("auto_map in the tokenizer's config", "B10", both(spied(), tokenized(auto_map={"AutoTokenizer": ["modeling_evil.Evil", None]},
         tokenizer_class="Evil")), "contains custom code", loads=True),
    Case("good: auto_map in the generation config is not run", "B10", both(spied("custom_generate/generate.py"), changed("generation_config.json",
         auto_map={"AutoModel": "modeling_evil.Evil"}, custom_generate="evil/repo")), "", loads=True),
    Case("trust_remote_code in the config", "B10", configured(trust_remote_code=True), "must not set 'trust_remote_code'"),
    Case("custom_pipelines", "B10", configured(custom_pipelines={"text-generation": {"impl": "modeling_evil.Evil"}}), "run code of its own: .*custom_pipelines"),
    Case("good: _attn_implementation of the hub is not fetched", "B9", configured(_attn_implementation="kernels-community/evil"), "", loads=True),
    Case("good: attn_implementation of the hub is not fetched", "B9", configured(attn_implementation="evil/kernel"), "", loads=True),
    Case("good: _attn_implementation_internal is not fetched", "B9", configured(_attn_implementation_internal="evil/kernel"), "", loads=True),
    Case("_attn_implementation in text_config", "B9", configured(text_config={"_attn_implementation": "evil/kernel"}), "must not set '_attn_implementation'"),
    Case("experts_implementation of the hub", "B9", configured(experts_implementation="evil/kernel"), "must not set 'experts_implementation'"),
    Case("another weight file", "B8 B9", configured(transformers_weights="../outside/x.safetensors"), "must not set 'transformers_weights'"),
    Case("a distributed run", "B9", configured(distributed_config={"enable_expert_parallel": True}), "must not set 'distributed_config'"),
    Case("modules to be replaced", "B9", configured(fusion_config={"a": "b"}), "must not set 'fusion_config'"),
    Case("kernels to be used", "B9", configured(use_kernels=True, kernel_config={"a": "b"}), "must not set"),
    Case("_target_ of hydra", "B10", configured(_target_="os.system", _args_=["touch canary"]), "must not set '_target_'"),
    Case("good: tokenizer of a module is not imported", "B10", both(spied("tokenization_evil.py"), tokenized(tokenizer_class="tokenization_evil.Evil")), "", loads=True),
    Case("good: tokenizer_file outside is not read", "B8 B19", tokenized(tokenizer_file="/etc/hostname", vocab_file="/etc/hostname"), "", loads=True),
    Case("good: python files lie unused", "B10", both(spied(), spied("configuration_llama.py"), spied("tokenization.py"), spied("sitecustomize.py")),
         "", loads=True),
]  # fmt: skip

JSON = [
    Case("config missing", "B17", without(CONFIG), "has no config.json"),
    Case("config empty", "B17", raw(b""), "does not hold valid JSON"),
    Case("config not JSON", "B17", raw("{"), "does not hold valid JSON"),
    Case("config a list", "B17", raw("[]"), "must hold a JSON object"),
    Case("config not UTF-8", "B17", raw(b'{"model_type": "\xe9"}'), "is not UTF-8"),
    Case("config with a BOM", "B17", raw(b'\xef\xbb\xbf{"model_type": "llama"}'), "valid JSON"),
    Case("config in UTF-16", "B17", raw('{"model_type": "llama"}'.encode("utf-16")), "is not UTF-8"),
    Case("config nested 100,000 deep", "B17", raw(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "valid JSON"),
    Case("config list nested 100,000 deep", "B17", raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "valid JSON"),
    Case("config nested 800 deep", "B17", raw(b'{"model_type":"llama","a":' + b"[" * 800 + b"]" * 800 + b"}"), "nested|valid JSON"),
    Case("config of 1 GB", "B17", sparse(CONFIG, 1 << 30, b"{"), "is larger than"),
    Case("config of 8 TB", "B17", sparse(CONFIG, 8 << 40, b"{"), "is larger than"),
    Case("config of 5 million empty lists", "B17", raw(b'{"a":[' + b"[]," * 5_000_000 + b"[]]}"), "is larger than|lists more than"),
    Case("config key twice", "B17", raw('{"model_type": "llama", "model_type": "gpt2"}'), "names 'model_type' twice"),
    Case("config number of 10,000 digits", "B17", raw('{"model_type": "llama", "vocab_size": ' + "9" * 10_000 + "}"), "valid JSON"),
    Case("tokenizer.json of 5 GB", "B17", sparse("tokenizer.json", 5 << 30), "is larger than"),
    Case("tokenizer_config.json of 1 GB", "B17", sparse("tokenizer_config.json", 1 << 30), "is larger than"),
    Case("generation_config.json of 1 GB", "B17", sparse("generation_config.json", 1 << 30), "is larger than"),
    Case("tokenizer_config.json nested 100,000 deep", "B17", written("tokenizer_config.json", b"[" * 100_000), "valid JSON"),
    Case("tokenizer.json nested 100,000 deep", "B17", written("tokenizer.json", b"[" * 100_000), "valid JSON|cannot be loaded", loads=True),
    Case("tokenizer_config.json a list", "B17", written("tokenizer_config.json", []), "must hold a JSON object"),
    Case("generation_config.json garbage", "B17", written("generation_config.json", b"\xff{"), "is not UTF-8|valid JSON"),
    Case("tokenizer.json garbage", "B17", written("tokenizer.json", b"garbage"), "valid JSON|cannot be loaded", loads=True),
    Case("chat template of 1 GB", "B17 B22", sparse("chat_template.jinja", 1 << 30), "is larger than"),
]  # fmt: skip

MODELS = [
    Case("architecture unknown", "B14", configured(model_type="lama"), "Did you mean 'llama'"),
    Case("architecture no text", "B14", configured(model_type=["llama"]), "must name its model_type"),
    Case("architecture missing", "B14", configured(model_type=None), "must name its model_type"),
    Case("architecture of a vision model", "B14", configured(model_type="vit"), "must be a causal language model"),
    Case("config of gpt2", "B14", configured(model_type="gpt2"), "lacks weights|tensors must agree|no place", loads=True),
    Case("config of gpt_neox", "B14", configured(model_type="gpt_neox"), "lacks weights|no place", loads=True),
    Case("config of opt", "B14", configured(model_type="opt", ffn_dim=96, word_embed_proj_dim=64), "lacks weights|no place", loads=True),
    Case("config of diffllama", "B14 B15", configured(model_type="diffllama"), "lacks weights of its model: .*lambda", loads=True),
    Case("config of mamba", "B14", configured(model_type="mamba"), "lacks weights|no place|cannot be loaded", loads=True),
    Case("model type with an escape", "B14 B20", configured(model_type="\x1b[2J\u202ellama"), "architecture must be"),
    Case("one matrix transposed", "B12", replaced("up_proj.weight", lambda w: w.T), r"holds '.*up_proj.weight' of shape \[64, 96\]"),
    Case("embedding one row short", "B12", replaced("embed_tokens.weight", lambda w: w[:-1]), "tensors must agree"),
    Case("hidden size of another model", "B12", configured(hidden_size=128), "tensors must agree"),
    Case("inner size of another model", "B12", configured(intermediate_size=100), "tensors must agree"),
    Case("more layers than tensors", "B12", configured(num_hidden_layers=3), "layer 2 is missing"),
    Case("fewer layers than tensors", "B12", configured(num_hidden_layers=1), "no place for", loads=True),
    Case("norm of another width", "B12", replaced("input_layernorm.weight", lambda w: w[:32]), "the model asks for", loads=True),
    Case("norm missing", "B12", replaced("input_layernorm.weight", lambda w: None), "lacks weights", loads=True),
    Case("embedding missing", "B12", replaced("embed_tokens.weight", lambda w: None), "lacks weights", loads=True),
    Case("tensor too many", "B12", added("model.layers.0.extra.weight", np.ones(3, np.float32)), "no place for", loads=True),
    Case("matrix of three dimensions", "B12", replaced("up_proj.weight", lambda w: w[None]), "tensors must agree"),
    Case("weights are integers", "B12", reweighted(lambda a: a.update({k: v.astype(np.int8) for k, v in a.items()})), "must be floats of 16 bits"),
    Case("one weight is integers", "B12", replaced("up_proj.weight", lambda w: w.astype(np.int32)), "floats"),
    Case("one weight is truths", "B12", replaced("down_proj.weight", lambda w: w > 0), "floats"),
    Case("NaN in a matrix", "B25", poked("up_proj.weight", float("nan")), "holds 1 NaN or Inf among the 6144", loads=True),
    Case("Inf in a norm", "B25", poked("input_layernorm.weight", float("inf")), "holds 1 NaN or Inf among the 64", loads=True),
    Case("-Inf in the embedding", "B25", poked("embed_tokens.weight", float("-inf")), "must be finite", loads=True),
    Case("all NaN", "B25", replaced("k_proj.weight", lambda w: w * np.float32("nan")), "must be finite", loads=True),
    Case("outlier of 1e38 in float16", "B26", poked("up_proj.weight", 1e38), "loaded as float16", loads=True, verb="profile16"),
    Case("outlier of 65,520 in float16", "B26", poked("down_proj.weight", 65_520.0), "loaded as float16", loads=True, verb="profile16"),
    Case("norm of 1e5 in float16", "B26", poked("post_attention_layernorm.weight", 1e5), "loaded as float16", loads=True, verb="profile16"),
    Case("good: a matrix of zeros", "B26", replaced("up_proj.weight", lambda w: w * 0), "", loads=True),
    Case("good: a constant column", "B26", replaced("up_proj.weight", lambda w: np.where(np.arange(64) == 3, np.float32(1), w)), "", loads=True),
    Case("good: lm_head stored twice and equal", "B27", reweighted(lambda a: a.update({"lm_head.weight": a["model.embed_tokens.weight"]})),
         "", base="tied", loads=True),
    Case("lm_head stored twice and unequal", "B27", reweighted(lambda a: a.update({"lm_head.weight": a["model.embed_tokens.weight"] + 1})),
         "tied|tie_word_embeddings", base="tied", loads=True),
    Case("lm_head stored twice, of another shape", "B27", reweighted(lambda a: a.update({"lm_head.weight": a["model.embed_tokens.weight"][:8]})),
         "must agree with the config", base="tied"),
    Case("lm_head stored twice, one value apart", "B27", both(reweighted(lambda a: a.update(
         {"lm_head.weight": a["model.embed_tokens.weight"].copy()})), poked("lm_head.weight", 3.0)), "tied|tie_word_embeddings", base="tied", loads=True),
    Case("lm_head neither stored nor tied", "B27", configured(tie_word_embeddings=False), "lacks weights of its model: .*lm_head", base="tied", loads=True),
]  # fmt: skip


def _quantized(**changes: Any) -> Damage:
    """Change the one group of a compressed-tensors config."""

    def damage(it: Path) -> None:
        config = json.loads((it / CONFIG).read_text())
        group = next(iter(config["quantization_config"]["config_groups"].values()))
        group["weights"] |= changes
        (it / CONFIG).write_text(json.dumps(config))

    return damage


QUANTIZED = [
    Case("scale Inf", "B13", poked("weight_scale", float("inf")), "must be finite", base="compressed", loads=True),
    Case("scale NaN", "B13", poked("weight_scale", float("nan")), "must be finite", base="compressed", loads=True),
    Case("scale -Inf in float16", "B13", replaced("weight_scale", lambda s: np.full_like(s, -np.inf).astype(np.float16)),
         "must be finite", base="compressed", loads=True),
    Case("scales of another shape", "B12 B13", replaced("weight_scale", lambda s: s[:, :1]), "one for each group", base="compressed"),
    Case("scales missing", "B12 B13", replaced("weight_scale", lambda s: None), "must have its shape and scales", base="compressed"),
    Case("codes one column short", "B12", replaced("weight_packed", lambda p: p[:, :-1]), "must|cannot be loaded", base="compressed", loads=True),
    Case("weight_shape of 2^40", "B6 B12", replaced("weight_shape", lambda s: np.array([2**40, 2**40])), "must have its own rows", base="compressed"),
    Case("weight_shape negative", "B6 B12", replaced("weight_shape", lambda s: -s), "must", base="compressed"),
    Case("weight_shape of floats", "B12", replaced("weight_shape", lambda s: s.astype(np.float64)), "stores a shape as F64", base="compressed"),
    Case("weight_shape of a million", "B12", replaced("weight_shape", lambda s: np.ones(10**6, np.int64)), "stores a shape as", base="compressed"),
    Case("bits 0", "B16 B13", _quantized(num_bits=0), "must|cannot be loaded", base="compressed", loads=True),
    Case("bits 63", "B16 B13", _quantized(num_bits=63), "must|cannot be loaded", base="compressed", loads=True),
    Case("group size 0", "B16 B13", _quantized(group_size=0), "group_size must be", base="compressed"),
    Case("group size 7", "B16 B13", _quantized(group_size=7), "one for each group", base="compressed"),
    Case("config groups of nobody", "B13", configured(quantization_config={"quant_method": "compressed-tensors"}), "must describe its weights", base="compressed"),
    Case("good: four bits in groups of 32", "B13", lambda it: None, "", base="compressed", loads=True),
    Case("diff model with odd heads", "B15", configured(num_attention_heads=5, num_key_value_heads=5, head_dim=16), "must", base="diff", loads=True),
    Case("diff model without a lambda", "B15", replaced("lambda_.q1", lambda w: None), "lacks weights of its model: .*lambda", base="diff", loads=True),
    Case("diff model of no such variant", "B15", configured(variant="diff_v9"), "diff_v9", base="diff", loads=True),
    Case("diff model with an option unknown", "B15", configured(variant_options={"lambda": 1}), "lambda", base="diff", loads=True),
    Case("diff model with NaN in its lambda", "B15 B25", poked("lambda_.q1", float("nan"), 0), "must be finite", base="diff", loads=True),
    Case("diff model with lambda of another shape", "B15", replaced("lambda_.k2", lambda w: w[:1]), "the model asks for", base="diff", loads=True),
    Case("diffllama without lambda_k1", "B15", replaced("lambda_k1", lambda w: None), "lacks weights of its model: .*lambda_k1", base="diffllama", loads=True),
    Case("diffllama with odd heads", "B15", configured(num_attention_heads=1, num_key_value_heads=1, head_dim=64), "must", base="diffllama", loads=True),
    Case("good: diff model", "B15", lambda it: None, "", base="diff", loads=True),
]  # fmt: skip

TOKENIZERS = [
    Case("architecture of a megabyte", "B14 B20", configured(model_type="llama" * 200_000), "architecture must be"),
    Case("tokenizer missing", "B23", without("tokenizer.json", "tokenizer_config.json"), "must hold its tokenizer"),
    Case("tokenizer ids past the embedding", "B23", retokenized(_more_tokens), "every token id must be a row", loads=True),
    Case("tokenizer of another kind", "B23", retokenized(lambda tree: tree["model"].update(type="Evil")), "cannot be loaded", loads=True),
    Case("tokenizer with a merge of no token", "B23", retokenized(lambda tree: tree["model"]["merges"].append(["zzz", "qqq"])), "cannot be loaded", loads=True),
    Case("tokenizer with negative ids", "B23", retokenized(lambda tree: tree["model"]["vocab"].update({"a": -1})), "cannot be loaded", loads=True),
    Case("tokenizer with id 2^40", "B23", retokenized(lambda tree: tree["model"]["vocab"].update({"a": 2**40})), "cannot be loaded", loads=True),
    Case("added token 4294967295", "B23", retokenized(lambda tree: tree["added_tokens"].append({"id": 2**32 - 1, "content": "the", "special": True,
         "single_word": False, "lstrip": False, "rstrip": False, "normalized": False})), "every token id must be a row|cannot be loaded", loads=True),
    Case("tokenizer whose charsmap is broken", "B23", retokenized(lambda tree: tree.update(normalizer={"type": "Precompiled",
         "precompiled_charsmap": "AAAAAAAA"})), "cannot be loaded", loads=True),
    Case("tokenizer whose charsmap is no base64", "B23", retokenized(lambda tree: tree.update(normalizer={"type": "Precompiled",
         "precompiled_charsmap": "!!"})), "cannot be loaded", loads=True),
    Case("tokenizer with a broken pattern", "B23", retokenized(lambda tree: tree.update(pre_tokenizer={"type": "Split",
         "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False})), "cannot be loaded", loads=True),
    Case("good: a template that would run code", "B22", tokenized(chat_template=TEMPLATE), "", loads=True),
    Case("good: a template file that would run code", "B22", written("chat_template.jinja", TEMPLATE), "", loads=True),
    Case("good: one of many templates that would run code", "B22", written("additional_chat_templates/tool.jinja", TEMPLATE), "", loads=True),
    Case("good: a template in chat_template.json", "B22", written("chat_template.json", {"chat_template": TEMPLATE}), "", loads=True),
    Case("adapter", "B30", written("adapter_config.json", {"base_model_name_or_path": "."}), "holds an adapter"),
    Case("adapter of itself", "B30", lambda it: written("adapter_config.json", {"base_model_name_or_path": str(it)})(it), "holds an adapter"),
    Case("good: a card whose base_model is itself", "B30", lambda it: written("README.md", f"---\nbase_model: {it}\n---\n")(it), "", loads=True),
    Case("good: _name_or_path leads in a ring", "B30", lambda it: configured(_name_or_path=str(it), base_model=str(it))(it), "", loads=True),
    Case("good: a folder that links to itself", "B30 B19", linked("loop", "."), "", loads=True),
    Case("index that names itself", "B30", both(without(WEIGHTS), written("model.safetensors.index.json",
         {"weight_map": {"a": "model.safetensors.index.json"}})), "files of its own folder"),
]  # fmt: skip

CASES = [*SIZES, *CODE, *JSON, *MODELS, *QUANTIZED, *TOKENIZERS]
