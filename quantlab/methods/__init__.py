"""Weight methods: one file each, one signature, `quantize_weight(weight_OI, spec) -> QuantizedTensor`."""
