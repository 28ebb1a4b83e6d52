"""A safetensors checkpoint as a source: headers first, tensors when asked for, checksums verified."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hqq.core.wire import decode_state
from hqq.errors import CheckpointError, CorruptCheckpointError
from hqq.models.checkpoint.layout import INDEX, SINGLE, read_json
from hqq.models.checkpoint.safetensors_writer import CHECKSUM_KEY, SHARED_KEY, checksum
from hqq.models.checkpoint.source import LayerState

_BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16}
_BITS |= {"I16": 16, "U16": 16}
# What of a layer is large; the rest is read to describe it.
_BULK = ("W_q", "scale", "zero", "bias", "scale_q", "zero_q", "zero_scale")


class SafetensorsSource:
    """The units of the safetensors file or files in `directory`.

    Raises CheckpointError (an index that names absent files or tensors) or CorruptCheckpointError.
    """

    def __init__(self, directory: Path) -> None:
        self.shared: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._checksums: dict[str, str] = {}
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        self._sizes: dict[str, int] = {}
        for file in _files(directory):
            self._open(directory / file)
        self._check_index(directory)
        self._keys = self._by_unit()
        self.layers = frozenset(name for name in self._keys if f"{name}.W_q" in self._file_of)
        self.units = {name: sum(self._sizes[key] for key in keys) for name, keys in self._keys.items()}

    def layer(self, name: str) -> LayerState:
        return self._decode(name, self._read(name, self._keys[name]))

    def layer_outline(self, name: str) -> LayerState:
        """Return a layer's state without its large tensors."""
        keys = [key for key in self._keys[name] if key.rpartition(".")[2] not in _BULK]
        return self._decode(name, {key: self._tensor(key) for key in keys})

    def tensor(self, name: str) -> Tensor:
        return self._read(name, [name])[name]

    def layer_bytes(self, name: str) -> int:
        """Return the bytes of a layer's codes, scale, zero and bias."""
        return sum(self._sizes[key] for key in self._keys[name] if key.rpartition(".")[2] in _BULK)

    def _decode(self, name: str, tensors: dict[str, Tensor]) -> LayerState:
        state = decode_state({key[len(name) + 1 :]: value for key, value in tensors.items()})
        state.pop("encoded_state_dict", None)
        return state

    def _read(self, unit: str, keys: list[str]) -> dict[str, Tensor]:
        tensors = {key: self._tensor(key) for key in keys}
        expected = self._checksums.get(unit)
        if expected is not None and checksum(tensors) != expected:
            raise CorruptCheckpointError(
                f"{unit}: got data in {self._file_of[keys[0]]} with checksum {checksum(tensors)}; expected {expected}. "
                "The file was damaged after it was written: restore or download it again"
            )
        return tensors

    def _tensor(self, key: str) -> Tensor:
        file = self._file_of[key]
        with _reading(Path(file)):
            tensor: Tensor = self._files[file].get_tensor(key)
        return tensor

    def _open(self, path: Path) -> None:
        with _reading(path):
            file: Any = safe_open(str(path), framework="pt", device="cpu")
            metadata = file.metadata() or {}
            keys = list(file.keys())
        self._files[path.name] = file
        self._checksums.update(_json_map(metadata, CHECKSUM_KEY, path))
        self.shared.update(_json_map(metadata, SHARED_KEY, path))
        for key in keys:
            view = file.get_slice(key)
            shape = tuple(view.get_shape())
            self._file_of[key] = path.name
            self.shapes[key] = shape
            self._sizes[key] = torch.Size(shape).numel() * _BITS.get(view.get_dtype(), 8) // 8

    def _check_index(self, directory: Path) -> None:
        if not (directory / INDEX).exists():
            return
        absent = [
            key
            for key, file in _weight_map(directory).items()
            if self._file_of.get(key) != file and key not in self.shared
        ]
        if absent:
            raise CorruptCheckpointError(
                f"got {INDEX} that places {', '.join(absent[:5])} in files that do not hold them; "
                "the files belong to different checkpoints: download or save them again"
            )

    def _by_unit(self) -> dict[str, list[str]]:
        """Return the keys of each layer and plain tensor. A layer is what has a W_q; nested keys belong to it."""
        layers = {key[: -len(".W_q")] for key in self._file_of if key.endswith(".W_q")}
        units: dict[str, list[str]] = {}
        for key in self._file_of:
            owner = next((head for head in _heads(key) if head in layers), key)
            units.setdefault(owner, []).append(key)
        for keys in units.values():
            keys.sort()
        return dict(sorted(units.items()))


def _heads(key: str) -> Iterator[str]:
    head = key.rpartition(".")[0]
    while head:
        yield head
        head = head.rpartition(".")[0]


def _weight_map(directory: Path) -> dict[str, str]:
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpointError(
            f"got {directory / INDEX} without a weight_map; expected tensor names with files"
        )
    return weight_map


def _files(directory: Path) -> list[str]:
    if not (directory / INDEX).exists():
        return [SINGLE]
    files = sorted(set(_weight_map(directory).values()))
    absent = [file for file in files if Path(file).name != file or not (directory / file).is_file()]
    if absent:
        raise CheckpointError(
            f"got {INDEX} naming {', '.join(absent)}, which {directory} does not hold; "
            "the download or copy is incomplete: fetch the missing files"
        )
    return files


def _json_map(metadata: dict[str, str], key: str, path: Path) -> dict[str, str]:
    try:
        value = json.loads(metadata.get(key, "{}"))
    except ValueError as error:
        raise CorruptCheckpointError(f"got {path} with unreadable {key} in its header ({error})") from error
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise CorruptCheckpointError(
            f"got {path} with {key}={value!r} in its header; expected names with texts"
        )
    return value


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise CorruptCheckpointError(
            f"got {path.name}, which is not a complete safetensors file ({error}); restore or download it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"got {path}, which cannot be read: {error}") from error
