"""The original's fast generation for transformers' models, under its old path."""

from __future__ import annotations

from hqq.models.generate import (
    WARMUP_PROMPTS,
    HFGenerator,
    patch_model_for_compiled_runtime,
    unpatch_model_for_compiled_runtime,
)

__all__ = [
    "WARMUP_PROMPTS",
    "HFGenerator",
    "patch_model_for_compiled_runtime",
    "unpatch_model_for_compiled_runtime",
]
