"""Block-coordinate training on DeepSpeed ZeRO-3; what is private to DeepSpeed is used here alone."""
