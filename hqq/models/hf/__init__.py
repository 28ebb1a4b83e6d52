"""Old per-family import paths of transformers models."""
