"""Toy folders of the two formats whose scales are float16, gptq and awq, and the codes that they must hold."""

from pathlib import Path

import torch

from quantlab.calibration.calibrator import Calibrator
from quantlab.config import QuantizeConfig
from quantlab.export.codes import as_decoded
from quantlab.export.folder import export_checkpoint
from quantlab.quantize import prepared
from quantlab.reading.decoded import Decoded
from quantlab.schemes import Scheme
from tests.quantlab.export.toy_folders import loaded


def calibrator(scheme: Scheme) -> Calibrator | None:
    ids = torch.randint(1, 512, (4, 48), generator=torch.Generator().manual_seed(3))
    return Calibrator(ids) if scheme.needs else None


def export(form: str, source: Path, name: str, folder: Path, skip: tuple[str, ...] = ()) -> Path:
    scheme = Scheme.parse(name)
    config = QuantizeConfig(skip=skip)
    export_checkpoint(loaded(source), scheme, form, folder, config=config, calibrator=calibrator(scheme))
    return folder


def chosen_codes(source: Path, name: str) -> dict[str, Decoded]:
    """What our quantizer chooses with float16 scales, by linear."""
    checkpoint, scheme = loaded(source), Scheme.parse(name)
    text = calibrator(scheme)
    with prepared(checkpoint.model, scheme, scale_dtype=torch.float16, calibrator=text) as ready:
        return {name: as_decoded(ready.solve(name).quantized) for name in ready.linears}
