"""What quantisation costs a language model, by bits, axis, group size and solver: `python -m benchmarks.quality`."""
