"""AutoHQQHFModel: the original's entry point for transformers models; any nn.Module can be quantised with it."""

from __future__ import annotations

from hqq.models.base import BaseHQQModel


class BaseHQQHFModel(BaseHQQModel):
    """Models whose architecture config.json describes."""


class AutoHQQHFModel(BaseHQQHFModel):
    """Quantise, save (qmodel.pt, or safetensors in blocks) and load a transformers model of any architecture."""
