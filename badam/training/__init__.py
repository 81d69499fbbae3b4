"""Assembles model, data, method and trainer from a plan, and runs it."""
