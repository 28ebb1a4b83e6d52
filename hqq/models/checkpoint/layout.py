"""The files of a checkpoint directory: names, formats, and where a checkpoint is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from hqq.errors import CheckpointError, CorruptCheckpointError
from hqq.models.checkpoint.atomic import recover
from hqq.models.checkpoint.disk import Disk

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH = "qmodel.pt"
FORMATS = ("safetensors", "pt")

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_FOREIGN = re.compile(
    r"(pytorch_model|tf_model|flax_model|consolidated).*\.(bin|h5|msgpack|pth|safetensors|index\.json)"
)


def shard_name(number: int, total: int) -> str:
    """Return the name of shard `number` (from 1) of `total`."""
    return SINGLE if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"


def is_checkpoint_file(name: str) -> bool:
    """Whether a file called `name` belongs to the checkpoint proper, and goes when another takes its place."""
    return name in (CONFIG, SINGLE, INDEX, TORCH) or _SHARD.fullmatch(name) is not None


def is_weight_file(name: str) -> bool:
    """Whether a file called `name` holds a model's weights, of any kind."""
    return (is_checkpoint_file(name) and name != CONFIG) or _FOREIGN.fullmatch(name) is not None


def check_format(name: str) -> str:
    """Return `name` if it is a checkpoint format, else raise CheckpointError."""
    if name not in FORMATS:
        raise CheckpointError(f"got format={name!r}; expected one of {', '.join(FORMATS)}")
    return name


def detect_format(directory: Path) -> str:
    """Return "safetensors" or "pt"; raises CheckpointError if `directory` holds no checkpoint."""
    if (directory / INDEX).exists() or (directory / SINGLE).exists():
        return "safetensors"
    if (directory / TORCH).exists():
        return "pt"
    present = ", ".join(sorted(path.name for path in directory.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"got {directory}, which holds {present}; expected {SINGLE}, {INDEX} or {TORCH} with {CONFIG}"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; raises CheckpointError if absent, CorruptCheckpointError if it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"got {path.parent} without {path.name}; expected it beside the weights"
        ) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise CorruptCheckpointError(
            f"got {path}, which is not JSON ({error}); restore or download it again"
        ) from error
    if not isinstance(value, dict):
        raise CorruptCheckpointError(f"got {path} with a {type(value).__name__}; expected a JSON object")
    return value


def locate(source: str | Path, cache_dir: str | Path | None = None) -> Path:
    """Return the directory of a checkpoint: a local path, or a hub id that is downloaded first.

    Raises CheckpointError if there is neither.
    """
    path = Path(source).expanduser()
    recover(path, Disk())
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"got {path}, which is a file; expected the directory that holds it")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith((".", "/")):
        raise CheckpointError(
            f"got {source!s}, which does not exist; expected a directory or a hub id (owner/name)"
        )
    return _download(str(source), cache_dir)


def _download(repo_id: str, cache_dir: str | Path | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"got {repo_id}, which is no local directory; to download it from the hub, install hqq[hf]"
        ) from None
    try:
        return Path(snapshot_download(repo_id=repo_id, cache_dir=cache_dir))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"got {repo_id}, which is no local directory and could not be downloaded from the hub: {error}"
        ) from error
