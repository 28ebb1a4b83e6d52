"""Writing a checkpoint as safetensors: shards, index, checksums."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hqq.core.wire import encode_state
from hqq.errors import CheckpointError
from hqq.models.checkpoint.disk import Disk
from hqq.models.checkpoint.layout import INDEX, shard_name
from hqq.models.checkpoint.source import Source

# Keys of a file's metadata. Other readers ignore them.
SHARED_KEY = "hqq_shared"
CHECKSUM_KEY = "hqq_crc32"

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """Return a size in bytes, given as a number or as text such as "5GB" or "200MiB"; raises CheckpointError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    factor = _UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None or float(match[1]) * factor < 1:
        raise CheckpointError(
            f'got max_shard_size={size!r}; expected a number of bytes or text such as "5GB"'
        )
    return int(float(match[1]) * factor)


def shards_by_size(units: Mapping[str, int], limit: int) -> list[list[str]]:
    """Return the units in shards of at most `limit` bytes; a larger unit gets a shard of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in units.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def shards_by_blocks(units: Mapping[str, int], blocks: Sequence[str], per_file: int) -> list[list[str]]:
    """Return the units in shards of `per_file` blocks each (names of modules); what is in no block goes last."""
    shards: list[list[str]] = [[] for _ in range(max(1, len(blocks) // max(1, per_file)))]
    shard_of = {block: min(i // max(1, per_file), len(shards) - 1) for i, block in enumerate(blocks)}
    for name in units:
        block = next((head for head in _heads(name) if head in shard_of), None)
        shards[len(shards) - 1 if block is None else shard_of[block]].append(name)
    return [shard for shard in shards if shard]


def _heads(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def write_safetensors(directory: Path, source: Source, shards: Sequence[Sequence[str]], disk: Disk) -> None:
    """Write `source` into `directory`, one file per shard, and an index if there is more than one.

    Tensors are brought to the CPU one shard at a time.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for number, units in enumerate(shards, 1):
        file = shard_name(number, len(shards))
        tensors, metadata = _shard(source, units)
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
        disk.write_tensors(directory / file, tensors, metadata)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        disk.write_text(directory / INDEX, json.dumps(index, indent=2) + "\n")


def _shard(source: Source, units: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    checksums: dict[str, str] = {}
    names = set(units)
    for name in units:
        if name in source.layers:
            own = encode_state({**source.layer(name), "encoded_state_dict": True})
            own = {f"{name}.{key}": _storable(value) for key, value in own.items()}
        else:
            own = {name: _storable(source.tensor(name))}
        checksums[name] = checksum(own)
        tensors.update(own)
    metadata = {"format": "pt", CHECKSUM_KEY: json.dumps(checksums)}
    shared = {alias: name for alias, name in source.shared.items() if name in names}
    if shared:
        metadata[SHARED_KEY] = json.dumps(shared)
    return tensors, metadata


def _storable(tensor: Tensor) -> Tensor:
    """Return `tensor` on the CPU with a storage of its own size, as the format wants."""
    tensor = tensor.detach().to("cpu").contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the CRC-32 of the names and bytes of `tensors`, in the order of their names, as eight hex digits."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        if tensors[name].numel():
            value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
