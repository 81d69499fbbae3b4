"""Predicted against measured, and what later predictions learn from it. Pure."""
