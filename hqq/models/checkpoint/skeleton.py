"""Building a model's architecture without its weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from hqq.errors import CheckpointError
from hqq.models.checkpoint.layout import CONFIG, read_json


@contextmanager
def empty_weights(dtype: torch.dtype | None = None) -> Iterator[None]:
    """Build modules whose parameters are on the meta device, while their buffers are real.

    Buffers are what a constructor computes and no checkpoint holds, such as rotary frequencies. dtype: torch's
    default dtype meanwhile; None leaves it.
    """
    thread = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        # The memory was reserved, but not touched: what initialises it runs after this, on the meta device.
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    before = torch.get_default_dtype()
    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        torch.set_default_dtype(dtype or before)
        yield
    finally:
        torch.set_default_dtype(before)
        handle.remove()


def architectures_of(content: Mapping[str, Any]) -> list[str]:
    """Return the names of model classes in a config.json of transformers, empty if it has none."""
    nested = content.get("text_config")
    # transformers 4.57 writes those of some vision-language models into the part about text.
    found = content.get("architectures") or (
        nested.get("architectures") if isinstance(nested, Mapping) else None
    )
    return list(found or ())


def build_model(
    directory: Path, dtype: torch.dtype, config_options: dict[str, Any] | None = None
) -> nn.Module:
    """Return the transformers model that config.json describes, parameters on the meta device, in eval mode.

    Args:
        dtype: default dtype while the model is built.
        config_options: settings for the config, such as attn_implementation.

    Raises CheckpointError if config.json does not describe a transformers model, or none that this version has.
    """
    content = read_json(directory / CONFIG)
    architectures = architectures_of(content)
    hint = "build the model yourself and pass it: load_quantized(path, model=model)"
    if "model_type" not in content or not architectures:
        raise CheckpointError(
            f"got {directory / CONFIG} without model_type and architectures of transformers; {hint}"
        )
    try:
        import transformers
    except ImportError:
        raise CheckpointError(
            f"got a checkpoint of a transformers model; install hqq[hf], or {hint}"
        ) from None
    model_class = getattr(transformers, architectures[0], None)
    if model_class is None:
        raise CheckpointError(
            f"got architecture {architectures[0]!r}, which transformers {transformers.__version__} does not have; "
            f"install a version that does, or {hint}"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(directory, **(config_options or {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"got {directory / CONFIG}, which transformers does not take: {error}"
        ) from error
    with empty_weights(dtype):
        model: nn.Module = model_class(config)
    # Does what the checkpoint cannot tell: which parameters are one and the same.
    model.tie_weights()  # type: ignore[operator]
    if (directory / "generation_config.json").exists() and hasattr(model, "generation_config"):
        generation = transformers.GenerationConfig.from_pretrained(directory)
        model.generation_config = generation  # type: ignore[assignment]
    return model.eval()
