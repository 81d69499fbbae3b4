"""Functions of tensors that know nothing of blocks, optimizers or runs."""
