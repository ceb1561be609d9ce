"""Weight methods, one a file, one signature: `quantize_weights(weight_OI, specs, stats, *, scale_dtype, config)`.

`autoround` works on whole layers, and `formats` on what is no uniform grid.
"""
