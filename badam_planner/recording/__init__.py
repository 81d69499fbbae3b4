"""Allocations over time and what an allocator makes of them. Pure."""
