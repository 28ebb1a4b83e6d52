"""Whole models: quantising, placing, saving and loading them."""
