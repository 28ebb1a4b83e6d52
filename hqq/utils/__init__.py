"""Old import paths of inference helpers."""
