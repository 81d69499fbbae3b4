"""Predicted against measured memory on this CPU: cases, records, page. See benchmarks/cpu_accuracy.py."""
