"""Where a step's time and memory went, module by module."""
