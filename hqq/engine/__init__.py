"""Old import paths of wrapped model classes."""
