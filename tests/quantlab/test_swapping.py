"""Linears are swapped under every name that they have, and each row says what became of a matrix."""

import pytest
import torch

from quantlab.config import QuantizeConfig
from quantlab.export.compressed_tensors import layout
from quantlab.layers.linear import QuantLinear
from quantlab.quantize import quantized
from quantlab.schemes import Scheme
from tests.exporting import toy_job
from tests.quantlab.whole_models import modules_of
from tests.toys import toy_model


def test_the_table_says_what_stays_and_why() -> None:
    with quantized(
        toy_model("llama"), Scheme.parse("w4g32"), QuantizeConfig(skip=("*.down_proj", "*.0.mlp.up_proj"))
    ) as changes:
        pass
    rows = {row.name: row for row in changes.rows}
    assert rows["model.layers.1.mlp.down_proj"].why == "skip"
    assert rows["model.embed_tokens"].why.startswith("outside the decoder layers")
    assert rows["lm_head"].action == "skipped" and rows["lm_head"].bits == 16
    # Per layer q, o 64x64, k, v 32x64, gate, up, down 96x64; skipped: both down and one up.
    total, skipped = 2 * (2 * 4096 + 2 * 2048 + 3 * 6144), 3 * 6144
    assert changes.share_by_bits == {4: 1 - skipped / total, 16: skipped / total}
    storage = (total - skipped) * (4 + 32 / 32) + skipped * 16
    assert changes.average_storage_bits == storage / total
    others = 2 * 512 * 64 + 5 * 64
    assert changes.weights_bytes == (storage + 16 * others) / 8
    table = changes.table()
    down = next(row for row in table if row["name"] == "model.layers.*.mlp.down_proj")
    assert (down["count"], down["action"], down["num_weights"]) == (2, "skipped", 6144)
    assert sum(row["count"] for row in table) == len(changes.rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_count_as_they_are_stored(dtype: torch.dtype) -> None:
    """As an export weighs them, which adds 128 bits of shape to a linear."""
    scheme, names = Scheme.parse("w4g32"), [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    model = toy_model("llama")
    config = QuantizeConfig(skip=("*.mlp.*", "*.k_proj", "*.v_proj", "*.o_proj"))
    with toy_job(model, scheme.name, dtype, config) as job:
        written = layout(job)
    with quantized(model, scheme, config, scale_dtype=dtype) as changes:
        stored = sum(row.storage_bits for row in changes.rows if row.name in names)
    assert stored == 2 * 64 * 64 * (4 + 8 * dtype.itemsize / 32)
    assert stored + 2 * 128 == written.average_storage_bits * written.num_codes


def test_tied_weights_are_counted_once() -> None:
    model = toy_model("gpt2")
    with quantized(model, Scheme.parse("w8")) as changes:
        pass
    row = next(row for row in changes.rows if row.name == "lm_head")
    assert row.num_weights == 0 and row.why.endswith("tied to transformer.wte")
    counted = sum(row.num_weights for row in changes.rows)
    assert counted == sum(p.numel() for p in model.parameters() if p.ndim > 1)


def test_a_linear_that_the_model_holds_twice_stays_shared() -> None:
    model = toy_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    modules = modules_of(model)
    with quantized(model, Scheme.parse("w4")) as changes:
        assert model.model.layers[1].mlp.up_proj is model.model.layers[0].mlp.up_proj
        assert isinstance(model.model.layers[1].mlp.up_proj, QuantLinear)
    assert modules_of(model) == modules
    assert changes.share_by_bits == {4: 1.0}
