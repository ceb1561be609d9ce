"""Proof that a folder of low-bit weights holds what the quantizer chose, and that real engines load it."""
