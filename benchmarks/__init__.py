"""What the documentation claims, measured. Not installed: run from the repository, as ``python -m benchmarks.NAME``."""
