"""Loading the LoRA weights that the original keeps beside a quantised checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hqq.errors import CheckpointError


def load_adapter(model: nn.Module, file: str, compute_dtype: torch.dtype, base_class: Any) -> None:
    """Add the LoRA weights in `file` to `model`, in `compute_dtype`; raises CheckpointError if it is absent."""
    from hqq.core.peft import PeftUtils

    if not Path(file).is_file():
        raise CheckpointError(
            f"got adapter {file}, which does not exist; expected a file inside the checkpoint"
        )
    PeftUtils.load_lora_weights(model, filename=file, base_class=base_class)
    PeftUtils.cast_lora_weights(model, dtype=compute_dtype, base_class=base_class)
