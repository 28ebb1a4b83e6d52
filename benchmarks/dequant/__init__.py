"""Dequantisation measured on a GPU: bandwidth, this library's kernel, and what others do."""
