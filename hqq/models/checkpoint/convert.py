"""convert_checkpoint: the same layers, bit for bit, in the other format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hqq.core.config import WEIGHT_KEYS
from hqq.errors import CheckpointError
from hqq.models.checkpoint.config_file import (
    GENERATION_CONFIG,
    TOKENIZER_FILES,
    copy_companions,
    write_config,
)
from hqq.models.checkpoint.disk import Disk
from hqq.models.checkpoint.layout import CONFIG, check_format, locate, read_json
from hqq.models.checkpoint.load import open_source
from hqq.models.checkpoint.safetensors_writer import parse_size, shards_by_size
from hqq.models.checkpoint.save import write_directory, write_source
from hqq.models.checkpoint.transformers_names import FileSource
from hqq.models.quantization_config import quantization_config


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    format: str,  # noqa: A002 - as in save_quantized
    max_shard_size: int | str = "5GB",
    overwrite: bool = True,
    cache_dir: str | Path | None = None,
    disk: Disk | None = None,
) -> Path:
    """Write the checkpoint `source` (directory or hub id) to the directory `target` in `format` and return it.

    Codes, scales, zeros and all other tensors keep their bits; layers of hqq 0.1.x become layers of today's form.
    `target` may be `source`. Raises what `load_quantized` and `save_quantized` raise.
    """
    check_format(format)
    limit = parse_size(max_shard_size)
    disk = disk or Disk()
    directory = locate(source, cache_dir)
    opened = open_source(directory, mapped=True)
    if not opened.layers:
        raise CheckpointError(
            f"got {directory}, which holds no quantised layer; expected a checkpoint that hqq wrote"
        )
    content = read_json(directory / CONFIG) if (directory / CONFIG).exists() else {}
    content.setdefault("quantization_config", describe_source(opened))

    def write(new: Path) -> None:
        write_source(new, opened, format, lambda units: shards_by_size(units, limit), disk)
        write_config(new, content, disk)
        copy_companions(directory, new, (GENERATION_CONFIG, *TOKENIZER_FILES), disk)

    return write_directory(target, write, overwrite, disk)


def describe_source(source: FileSource) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint that was written without one."""
    configs = {}
    for name in sorted(source.layers):
        state = source.layer_outline(name)
        defaults = {
            "channel_wise": True,
            "optimize": True,
            "round_zero": state["nbits"] == 4,
            "view_as_float": False,
        }
        weight = {key: state.get(key, defaults.get(key)) for key in WEIGHT_KEYS}
        sections = {f"{stat}_quant_params": _section(state.get(f"meta_{stat}")) for stat in ("scale", "zero")}
        offload = bool(state.get("offload_meta"))
        configs[name] = {"weight_quant_params": weight, **sections, "offload_meta": offload}
    heads = [name[: -len(".weight")] for name in source.shapes if name.endswith("lm_head.weight")]
    return quantization_config(configs, heads)


def _section(meta: dict[str, Any] | None) -> dict[str, Any] | None:
    if meta is None:
        return None
    group_size = meta.get("group_size")
    params = {"nbits": meta["nbits"], "channel_wise": group_size is not None, "group_size": group_size}
    return {**params, "optimize": False}
