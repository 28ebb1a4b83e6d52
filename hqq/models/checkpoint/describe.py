"""describe_checkpoint: what a checkpoint holds, from its headers and small tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hqq.models.checkpoint.layout import detect_format, locate
from hqq.models.checkpoint.load import open_source
from hqq.models.checkpoint.transformers_names import FileSource
from hqq.models.preflight import ErrorsName
from hqq.models.report import LayerRow


@dataclass(frozen=True)
class PlainRow:
    """One tensor that is not quantised."""

    name: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class CheckpointDescription:
    """The quantised layers (iterating gives them) and the other tensors of a checkpoint.

    weights: number of weights the quantised layers and other tensors stand for. bytes: of all of them as stored.
    """

    path: str
    format: str
    layers: tuple[LayerRow, ...]
    tensors: tuple[PlainRow, ...]
    weights: int
    bytes: int

    @property
    def effective_bits(self) -> float:
        """Bits stored per weight of the whole model."""
        return 8 * self.bytes / self.weights if self.weights else 0.0

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the description as a JSON-able dict."""
        return {**asdict(self), "effective_bits": self.effective_bits}


def describe_checkpoint(path: str | Path, *, cache_dir: str | Path | None = None) -> CheckpointDescription:
    """Return what the checkpoint at `path` (directory or hub id) holds, without building the model.

    Raises what `load_quantized` raises for files that are absent or damaged.
    """
    directory = locate(path, cache_dir)
    source = open_source(directory, mapped=True)
    layers = [_layer_row(name, source) for name in source.units if name in source.layers]
    shared = [
        _shared_row(alias, name, source) for alias, name in source.shared.items() if name in source.layers
    ]
    tensors = [
        PlainRow(name, source.shapes[name], size)
        for name, size in source.units.items()
        if name not in source.layers
    ]
    weights = sum(_numel(row.shape) for row in layers) + sum(_numel(row.shape) for row in tensors)
    total = sum(row.bytes for row in layers) + sum(row.bytes for row in tensors)
    rows = (*layers, *shared)
    return CheckpointDescription(
        str(directory), detect_format(directory), rows, tuple(tensors), weights, total
    )


def _layer_row(name: str, source: FileSource, shared_with: str | None = None) -> LayerRow:
    with ErrorsName(shared_with or name):
        state = source.layer_outline(shared_with or name)
    meta = state.get("meta", state)
    return LayerRow(
        name=name,
        kind="layer",
        shape=tuple(meta["shape"]),
        nbits=meta["nbits"],
        group_size=meta.get("group_size"),
        axis=meta["axis"],
        bytes=0 if shared_with else source.layer_bytes(name),
        shared_with=shared_with,
    )


def _shared_row(alias: str, name: str, source: FileSource) -> LayerRow:
    return _layer_row(alias, source, shared_with=name)


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for extent in shape:
        total *= extent
    return total
