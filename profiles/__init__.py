"""Data only: the records of models and GPUs. Read them through badam_planner.sources."""
