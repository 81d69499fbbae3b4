"""The planner's impure edge: what it learns from models, cards, the driver, the host and the disk.

Everything else in :mod:`badam_planner` is a function of what the modules here return.
"""
