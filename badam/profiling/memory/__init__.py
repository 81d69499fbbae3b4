"""Measured bytes: the sources (CPU allocator, CUDA, NVML) and which named tensors hold them."""
