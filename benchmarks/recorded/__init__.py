"""What benchmarks/unchanged.py records, a module for each part."""
