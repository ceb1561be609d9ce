"""Ways to compute one quantized linear; `reference` defines the numbers, the others are faster ways to them.

    weight_only   16-bit inputs times dequantized weights                              reference.linear
    simulated     fake-quantized inputs times dequantized weights, in the model's dtype reference.linear
    int8_mm       integer codes times integer codes, summed exactly in int32           integer.linear
    llm_int8      the same but for outlier columns of a sequence, which stay real      llm_int8.linear
    int4_packed   bf16 inputs times 4-bit codes that stay packed in memory             packed_int4.linear
    int8_packed   bf16 inputs times 8-bit codes                                        packed_int8.linear

A kernel is chosen by name before anything runs (`choice.choose_kernel`) and stands in the record. `product` forms the
integer sums of int8_mm and llm_int8, the same on every CPU.
"""
