"""The original's ways to prepare a quantised model for inference, under their old path."""

from __future__ import annotations

from hqq.backends.patching import (
    patch_add_quant_config,
    patch_add_weight_param,
    patch_hqq_inference,
    patch_linearlayers,
    patch_lora_inference,
    recommended_inductor_config_setter,
)
from hqq.backends.prepare import PreparationReport, prepare_for_inference, restore

__all__ = [
    "PreparationReport",
    "patch_add_quant_config",
    "patch_add_weight_param",
    "patch_hqq_inference",
    "patch_linearlayers",
    "patch_lora_inference",
    "prepare_for_inference",
    "recommended_inductor_config_setter",
    "restore",
]
