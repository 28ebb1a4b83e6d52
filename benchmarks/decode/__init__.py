"""Whole-model decoding: tokens per second, and where a step goes."""
