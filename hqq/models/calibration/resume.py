"""A folder that keeps what an interrupted calibration has finished: the tokens, and each part's quantised layers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hqq
from hqq.errors import CheckpointError, CorruptCheckpointError
from hqq.models.calibration.settings import Calibration
from hqq.models.calibration.text import Batch
from hqq.models.plan import Job

_DESCRIPTION = "calibration.json"
_TOKENS = "tokens.pt"
_SAMPLES = 1024


class WorkFolder:
    """Files of one calibration in a folder, or nowhere if there is none.

    Raises CheckpointError if the folder holds those of another model, configuration or data.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, description: Mapping[str, Any]) -> None:
        self._folder = None if folder is None else Path(folder)
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / _DESCRIPTION
        wanted = json.loads(json.dumps(description))
        if file.exists():
            found = _read_json(file)
            differing = [key for key in wanted if found.get(key) != wanted[key]]
            if differing:
                raise CheckpointError(
                    f"got the folder {str(self._folder)!r}, which holds a calibration with another "
                    f"{', '.join(differing)}; use a new folder, or remove this one"
                )
        else:
            _replace(file, lambda path: path.write_text(json.dumps(wanted, indent=1) + "\n"))

    def tokens(self) -> Tensor | None:
        """Return the tokens kept here, or None."""
        kept = self._load(_TOKENS)
        return None if kept is None else kept["tokens"]

    def keep_tokens(self, tokens: Tensor) -> None:
        """Keep `tokens`."""
        self._save(_TOKENS, {"tokens": tokens})

    def part(self, index: int) -> dict[str, Any] | None:
        """Return what was kept of the model's part `index`, or None."""
        return self._load(f"part_{index:04d}.pt")

    def keep_part(self, index: int, content: Mapping[str, Any]) -> None:
        """Keep the content (tensors and plain values) of the model's part `index`."""
        self._save(f"part_{index:04d}.pt", dict(content))

    def _load(self, name: str) -> dict[str, Any] | None:
        if self._folder is None or not (self._folder / name).exists():
            return None
        try:
            content: dict[str, Any] = torch.load(self._folder / name, map_location="cpu", weights_only=True)
        except (RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
            raise CorruptCheckpointError(
                f"got {str(self._folder / name)!r}, which cannot be read: {error}; remove it to calibrate its layers "
                "again"
            ) from error
        return content

    def _save(self, name: str, content: Mapping[str, Any]) -> None:
        if self._folder is not None:
            _replace(self._folder / name, lambda path: torch.save(dict(content), path))


def _replace(file: Path, write: Any) -> None:
    # Under another name first: what has the name is whole.
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    write(part)
    part.replace(file)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise CorruptCheckpointError(f"got {str(file)!r}, which is no JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def describe(
    model: nn.Module, jobs: Iterable[Job], dtype: torch.dtype | None, settings: Calibration
) -> dict[str, Any]:
    """Return what has to be the same for a calibration to go on."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        _update(digest, name, parameter)
    configs = {job.name: asdict(job.config) for job in jobs}
    names = ("sequences", "length", "batch_size", "seed", "damping", "correction")
    return {
        "version": hqq.__version__,
        "model": digest.hexdigest(),
        "configuration": {"layers": configs, "compute_dtype": str(dtype)},
        "settings": {name: getattr(settings, name) for name in names},
        "data": _data_digest(settings),
    }


def _data_digest(settings: Calibration) -> str:
    if isinstance(settings.data, str):
        return settings.data
    digest = hashlib.sha256()
    _update_value(digest, settings.data)
    return digest.hexdigest()


def _update_value(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        _update(digest, "", value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            digest.update(str(key).encode())
            _update_value(digest, item)
    elif isinstance(value, (list, tuple, Batch)):
        for item in value:
            _update_value(digest, item)
    else:
        digest.update(repr(value).encode())


def _update(digest: Any, name: str, tensor: Tensor) -> None:
    """Add name, shape, dtype and evenly spaced elements: enough to tell models apart, without reading them whole."""
    values = tensor.detach().reshape(-1)
    step = max(1, values.numel() // _SAMPLES)
    sample = values[::step].to("cpu", torch.float64)
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(sample.numpy().tobytes())
