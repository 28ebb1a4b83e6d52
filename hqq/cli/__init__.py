"""The command `hqq`: quantise, inspect, evaluate, generate from and convert checkpoints."""

from __future__ import annotations

from hqq.cli.app import main

__all__ = ["main"]
