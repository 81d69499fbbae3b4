"""Measured memory and time of a training run."""
