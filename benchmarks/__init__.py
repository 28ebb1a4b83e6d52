"""Measurements. Each module is run as `python -m benchmarks.NAME` from the repository's root."""
