"""The file that adapters are saved in: the original's format, read without executing anything in it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from hqq.errors import CorruptCheckpointError


def write_adapters(
    filename: str | PathLike[str], peft_config: Mapping[str, Any], parameters: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write settings `{tag: settings or None}` and `{layer name: adapter state}` to `filename`."""
    # What training started from is not needed to load what it ended with.
    config = {tag: _without(settings, "lora_init") for tag, settings in peft_config.items()}
    torch.save({"peft_config": config, "parameters": dict(parameters)}, filename)


def _without(settings: Mapping[str, Any] | None, key: str) -> dict[str, Any] | None:
    return None if settings is None else {k: v for k, v in settings.items() if k != key}


def read_adapters(filename: str | PathLike[str]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return (settings or None, {layer name: adapter state}) of an adapter file.

    Files of version 0.1 have no settings. Raises CorruptCheckpointError for a file that is damaged, holds more than
    tensors and plain values, or no adapters.
    """
    with Path(filename).open("rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise CorruptCheckpointError(
                f"got {filename}, which is damaged or holds more than tensors and plain values ({reason}); "
                "expected what save_lora_weights writes"
            ) from error
    config, parameters = None, content
    if isinstance(content, dict) and {"peft_config", "parameters"} <= set(content):
        config, parameters = content["peft_config"], content["parameters"]
    if not isinstance(parameters, dict) or not all(isinstance(state, dict) for state in parameters.values()):
        raise CorruptCheckpointError(
            f"got {filename}, which holds no adapters; expected what save_lora_weights writes"
        )
    return config, parameters
