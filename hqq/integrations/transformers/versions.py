"""What the installed transformers needs: decided by what its code has, not by its version number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Need = Literal["nothing", "dtype", "loader", "unsupported"]

# The attribute of HqqHfQuantizer that says that it is repaired, and what it needed.
MARK = "_hqq_repair"

# What the repair of 5.x hangs on to.
_LOADER_HOOKS = (
    "get_quantize_ops",
    "get_weight_conversions",
    "param_needs_quantization",
    "preprocess_model",
    "postprocess_model",
    "_process_model_before_weight_loading",
    "_process_model_after_weight_loading",
)


@dataclass(frozen=True)
class Support:
    """How transformers loads HQQ models.

    need: "nothing" (it does by itself), "dtype" (4.57: layers would compute in float32), "loader" (5.x: it would not
    quantise, and load quantised checkpoints as random weights), "unsupported" (reason says why and what to do).
    """

    need: Need
    version: str
    reason: str | None = None


def support() -> Support:
    """Return what the installed transformers needs. Imports transformers' quantisation code."""
    import transformers
    from transformers.quantizers.base import HfQuantizer

    version = transformers.__version__
    quantizer = _quantizer_class()
    if quantizer is None:
        return _unsupported(version, "has no HqqHfQuantizer")
    if MARK in vars(quantizer):
        found: Support = getattr(quantizer, MARK)
        return found
    if "create_quantized_param" in vars(quantizer):
        return _support_of_4(version, quantizer)
    ops = getattr(quantizer, "get_quantize_ops", None)
    if ops is not None and ops is not getattr(HfQuantizer, "get_quantize_ops", None):
        return Support("nothing", version)
    missing = [name for name in _LOADER_HOOKS if not hasattr(HfQuantizer, name)]
    if missing or not _has_weight_converters():
        return _unsupported(
            version, "cannot quantise with HQQ itself, and loads weights in a way unknown to this hqq"
        )
    return Support("loader", version)


def _support_of_4(version: str, quantizer: type) -> Support:
    if "check_quantized_param" in vars(quantizer):
        if "update_expected_keys" not in vars(quantizer):
            return _unsupported(version, "is too old for this hqq")
        return Support("nothing", version)
    return Support("dtype", version)


def _unsupported(version: str, why: str) -> Support:
    advice = "install transformers>=4.49 in a version this hqq was tested with (up to 5.23), or a newer hqq"
    return Support("unsupported", version, f"transformers {version} {why}; {advice}")


def _quantizer_class() -> Any:
    try:
        from transformers.quantizers.quantizer_hqq import HqqHfQuantizer
    except ImportError:
        return None
    return HqqHfQuantizer


def _has_weight_converters() -> bool:
    try:
        from transformers.core_model_loading import ConversionOps, WeightConverter
    except ImportError:
        return False
    return hasattr(WeightConverter, "rename_source_key") and hasattr(ConversionOps, "convert")
