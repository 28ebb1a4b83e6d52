"""Skips these tests where PEFT or transformers is absent."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("peft") and find_spec("transformers") else ["test_*.py"]
