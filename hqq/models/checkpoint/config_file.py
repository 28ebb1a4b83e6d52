"""config.json and the small files beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hqq.models.checkpoint.disk import Disk
from hqq.models.checkpoint.layout import CONFIG

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "preprocessor_config.json",
    "processor_config.json",
)


def model_config(model: nn.Module, described: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of config.json for `model`: its own config if it has one, class, quantisation."""
    config: Any = getattr(model, "config", None)
    content: dict[str, Any] = {}
    if hasattr(config, "to_json_string"):
        content = json.loads(config.to_json_string())
    elif isinstance(config, Mapping):
        content = {str(key): value for key, value in config.items() if _is_json(value)}
    pretrained = getattr(model, "default_cfg", None) or getattr(model, "pretrained_cfg", None)
    if isinstance(pretrained, Mapping) and "architecture" in pretrained:
        content["architecture"] = pretrained["architecture"]
        content["num_classes"] = getattr(model, "num_classes", pretrained.get("num_classes"))
    content["architectures"] = [type(model).__name__]
    content["quantization_config"] = dict(described)
    return content


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def write_config(directory: Path, content: Mapping[str, Any], disk: Disk) -> None:
    """Write config.json."""
    disk.write_text(directory / CONFIG, json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_companions(directory: Path, model: nn.Module, disk: Disk) -> None:
    """Write the model's generation settings, and take over the tokenizer of the local directory it was loaded from."""
    generation: Any = getattr(model, "generation_config", None)
    if hasattr(generation, "to_json_string"):
        disk.write_text(directory / GENERATION_CONFIG, generation.to_json_string())
    origin = getattr(getattr(model, "config", None), "_name_or_path", None) or ""
    if origin and Path(origin).is_dir():
        copy_companions(Path(origin), directory, TOKENIZER_FILES, disk)


def copy_companions(origin: Path, directory: Path, names: tuple[str, ...], disk: Disk) -> None:
    """Copy the files called `names` that `origin` has and `directory` lacks."""
    for name in names:
        if (origin / name).is_file() and not (directory / name).exists():
            disk.copy(origin / name, directory / name)
