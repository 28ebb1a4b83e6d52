"""Quantisation of single tensors and layers, in plain torch."""
