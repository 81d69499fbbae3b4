"""Runs the trainer's own code on fake tensors and records every allocation. The only place here with torch."""
