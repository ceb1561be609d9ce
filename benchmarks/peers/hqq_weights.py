"""HQQ's own quantizer on SmolLM2, in the environment of the peers; needs no calibration.

OMP_NUM_THREADS=1 .venv-peers/bin/python benchmarks/peers/hqq_weights.py
"""

import argparse

import torch
from exchange import SMOLLM2, Stopwatch, leave
from hqq.core.quantize import BaseQuantizeConfig, Quantizer
from transformers import LlamaForCausalLM

BITS, GROUP = 4, 64


def main() -> None:
    """Quantize every linear of the decoder layers along its inputs (axis 1), as kernels need it."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    settings = BaseQuantizeConfig(nbits=BITS, group_size=GROUP, axis=1)["weight_quant_params"]
    tensors = {name: tensor for name, tensor in model.state_dict().items() if ".layers." in name}
    watch = Stopwatch()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            codes, meta = Quantizer.quantize(
                module.weight.data, device="cpu", compute_dtype=torch.float32, **settings
            )
            tensors[f"{name}.weight"] = Quantizer.dequantize(codes, meta)
    leave(
        "hqq",
        tensors,
        # A float16 scale and a float16 zero point for every group.
        {
            "method": "HQQ",
            "library": "hqq",
            "bits": BITS,
            "group_size": GROUP,
            "storage_bits": BITS + 32 / GROUP,
        }
        | {"settings": settings, "calibration_tokens": 0, **watch.seconds()},
    )


if __name__ == "__main__":
    main()
