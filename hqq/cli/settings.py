"""From the options of a command to what the library takes."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from hqq.core.config import QuantConfig, is_config_dict
from hqq.core.dtypes import dtype_from_name
from hqq.errors import CheckpointExistsError, ConfigError
from hqq.models.checkpoint import is_hqq_checkpoint
from hqq.models.checkpoint.layout import is_weight_file

_FIELDS = {field.name for field in fields(QuantConfig)}

Config = QuantConfig | dict[str, QuantConfig | None]


def dtype_of(args: argparse.Namespace) -> torch.dtype | None:
    """Return the dtype asked for, None for the model's own."""
    return None if args.dtype == "auto" else dtype_from_name(args.dtype)


def config_of(args: argparse.Namespace) -> Config:
    """Return the quantisation asked for: one configuration, or one per tag or glob if `--config` names layers.

    Raises ConfigError for JSON that is not such a configuration, OSError for a file that cannot be read.
    """
    base = {"nbits": args.nbits, "group_size": args.group_size, "axis": args.axis, "solver": args.solver}
    if args.config is None:
        return QuantConfig(**base)
    config = _read_json(args.config)
    if is_config_dict(config) or set(config) <= _FIELDS:
        return _one_config(config, base)
    return {tag: None if entry is None else _one_config(entry, base) for tag, entry in config.items()}


def check_target(path: Path, overwrite: bool) -> None:
    """Raise before the work, not after it, if the folder `path` must not or cannot be written."""
    if path.exists() and not path.is_dir():
        raise CheckpointExistsError(f"got {str(path)!r}, a file; expected a folder to write")
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise CheckpointExistsError(
            f"got {str(path)!r}, which exists; use --overwrite to replace it, or another name"
        )
    if (
        path.is_dir()
        and not is_hqq_checkpoint(path)
        and any(is_weight_file(entry.name) for entry in path.iterdir())
    ):
        raise CheckpointExistsError(
            f"got {str(path)!r}, which holds a model that is no hqq checkpoint; choose another folder to write"
        )
    existing = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
    if not existing.is_dir():
        raise NotADirectoryError(20, "Not a directory", str(existing))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(13, "Permission denied", str(existing))


def _read_json(text: str) -> dict[str, Any]:
    inline = text.lstrip().startswith("{")
    try:
        config = json.loads(text if inline else Path(text).expanduser().read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"got --config {text!r}, which is not valid JSON: {error}") from None
    if not isinstance(config, dict) or not config:
        raise ConfigError(
            f"got --config {text!r}; expected a JSON object that names layers and their settings"
        )
    return config


def _one_config(entry: Any, base: Mapping[str, Any]) -> QuantConfig:
    if is_config_dict(entry):
        return QuantConfig.from_dict(entry)
    if not isinstance(entry, dict) or set(entry) - _FIELDS:
        known = ", ".join(sorted(_FIELDS))
        raise ConfigError(f"got the settings {json.dumps(entry)}; expected an object with some of {known}")
    return QuantConfig(**{**base, **entry})
