"""Solving: codes for every linear that a scheme quantizes, layer by layer, with the statistics that its method needs.

`model.solve_model` takes the way that the method asks for:

    together.solve               each matrix by itself, or with the statistics of one calibration of the 16-bit model
    together.solve_together      the same for several schemes of one method at once: GPTQ shares one factorization
    sequential.solve_sequential  each layer sees inputs that come out of layers that were quantized already

and with `hessian: sequential` gives what linears see behind these codes (`seen`), for biases and static scales.

A linear's grid is the scheme's, or where the scheme is `mixed` that of the last pattern of `widths` that matches it.
"""
