"""The examples are scripts, not a package: their folder is put on the path as running one would."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
collect_ignore_glob = [] if find_spec("transformers") else ["test_*.py"]
