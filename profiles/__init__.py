"""Data only: model, GPU and measurement records. Read them through badam_planner.sources."""
