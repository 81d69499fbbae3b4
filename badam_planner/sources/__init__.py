"""What the planner learns from disk, Hub, driver and host: models, GPUs, calibrations. Loads no torch."""
