"""A CUDA device that computes nothing: PyTorch's real CUDA build, allocator included, on a machine without a GPU."""

from __future__ import annotations
