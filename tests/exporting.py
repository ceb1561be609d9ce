"""A job for a format's `layout`, of a model in memory that no folder stands for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from quantlab.config import QuantizeConfig
from quantlab.export.codes import Codes
from quantlab.export.job import ExportJob
from quantlab.quantize import prepared
from quantlab.schemes import Scheme
from tests.toys import toy_tokenizer


@contextmanager
def toy_job(
    model: PreTrainedModel,
    scheme: str,
    dtype: torch.dtype = torch.float32,
    config: QuantizeConfig = QuantizeConfig(),
    **options: Any,
) -> Iterator[ExportJob]:
    """What `export_checkpoint` would hand to a writer; `options` go to `prepared`. It has no CheckpointInfo."""
    parsed = Scheme.parse(scheme)
    with prepared(model, parsed, config, scale_dtype=dtype, **options) as ready:
        yield ExportJob(
            model=model,
            tokenizer=toy_tokenizer(),
            info=cast(Any, None),
            scheme=parsed,
            linears=ready.linears,
            dtype=dtype,
            codes=Codes(ready.solve),
            max_shard_size=10**9,
            advance=lambda count: None,
            ready=ready,
        )
