"""The optimizers and their parts; everything here works on live tensors of one training process."""
