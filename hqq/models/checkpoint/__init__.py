"""Checkpoints: safetensors and qmodel.pt, written atomically, read without trusting them."""

from hqq.models.checkpoint.convert import convert_checkpoint
from hqq.models.checkpoint.describe import CheckpointDescription, PlainRow, describe_checkpoint
from hqq.models.checkpoint.load import load_quantized
from hqq.models.checkpoint.save import is_hqq_checkpoint, save_quantized
from hqq.models.checkpoint.skeleton import empty_weights

__all__ = [
    "CheckpointDescription",
    "PlainRow",
    "convert_checkpoint",
    "describe_checkpoint",
    "empty_weights",
    "is_hqq_checkpoint",
    "load_quantized",
    "save_quantized",
]
