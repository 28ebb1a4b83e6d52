"""save_quantized: write a quantised model as a checkpoint directory, atomically."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from hqq.errors import CheckpointError, CheckpointExistsError
from hqq.models.checkpoint.atomic import recover, replace_directory
from hqq.models.checkpoint.config_file import model_config, write_companions, write_config
from hqq.models.checkpoint.disk import Disk
from hqq.models.checkpoint.layout import (
    CONFIG,
    TORCH,
    check_format,
    is_checkpoint_file,
    is_weight_file,
    read_json,
)
from hqq.models.checkpoint.model_source import ModelSource
from hqq.models.checkpoint.safetensors_writer import parse_size, shards_by_size, write_safetensors
from hqq.models.checkpoint.source import Source
from hqq.models.checkpoint.torch_file import write_torch
from hqq.models.quantization_config import describe_model

ShardPlan = Callable[[Mapping[str, int]], Sequence[Sequence[str]]]


def save_quantized(
    model: nn.Module,
    path: str | Path,
    *,
    format: str = "safetensors",  # noqa: A002 - the name that every saving function of the ecosystem uses
    max_shard_size: int | str = "5GB",
    overwrite: bool = True,
    disk: Disk | None = None,
) -> Path:
    """Write a quantised model to the directory `path` and return it.

    Args:
        format: "safetensors" (which transformers reads too) or "pt" (qmodel.pt, as AutoHQQHFModel writes it).
        max_shard_size: largest safetensors file, as bytes or text such as "5GB".
        overwrite: replace an hqq checkpoint that is already there. Files that are not part of it (tokenizer, model
            card) stay. A directory with other weights is never written to.
        disk: file operations; tests pass one that fails.

    A kill at any moment leaves the old checkpoint or the new one; see `hqq.models.checkpoint.atomic`. Shared weights
    are written once. Raises NotQuantizedError, CheckpointExistsError, or CheckpointError.
    """
    limit = parse_size(max_shard_size)
    return write_model(
        model, path, format, lambda units: shards_by_size(units, limit), overwrite, disk or Disk()
    )


def write_model(
    model: nn.Module,
    path: str | Path,
    format: str,  # noqa: A002
    plan: ShardPlan,
    overwrite: bool,
    disk: Disk,
) -> Path:
    """Write a quantised model with a shard plan of the caller's; see `save_quantized`."""
    check_format(format)
    source = ModelSource(model)
    skip = (getattr(getattr(model, "config", None), "quantization_config", None) or {}).get(
        "skip_modules", ()
    )
    content = model_config(model, describe_model(model, skip))

    def write(directory: Path) -> None:
        write_source(directory, source, format, plan, disk)
        write_config(directory, content, disk)
        write_companions(directory, model, disk)

    return write_directory(path, write, overwrite, disk)


def write_source(directory: Path, source: Source, format: str, plan: ShardPlan, disk: Disk) -> None:  # noqa: A002
    """Write the weights of `source` into `directory`."""
    if format == "pt":
        write_torch(directory, source, disk)
    else:
        write_safetensors(directory, source, plan(source.units), disk)


def write_directory(path: str | Path, write: Callable[[Path], None], overwrite: bool, disk: Disk) -> Path:
    """Make `path` the directory that `write` fills, if what is there may be replaced; see `save_quantized`."""
    target = Path(path).expanduser().resolve()
    recover(target, disk)
    _check_target(target, overwrite)
    try:
        replace_directory(target, write, is_checkpoint_file, disk)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"got {target}, which could not be written: {error}. It holds what it held, or the new checkpoint in full; "
            "check permissions and space"
        ) from error
    return target


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise CheckpointExistsError(
            f"got {target}, which is a file; expected a directory, or a path that does not exist"
        )
    if not target.exists():
        return
    if target == Path.cwd() or target in Path.cwd().parents or target.is_mount():
        raise CheckpointError(
            f"got {target}, which is in use (the current directory, one above it, or a mount point) and cannot be "
            "replaced as a whole; save into a directory inside it"
        )
    weights = sorted(entry.name for entry in target.iterdir() if is_weight_file(entry.name))
    if weights and not is_hqq_checkpoint(target):
        raise CheckpointExistsError(
            f"got {target}, which holds weights that are not an hqq checkpoint ({', '.join(weights[:3])}); "
            "choose another directory"
        )
    if weights and not overwrite:
        raise CheckpointExistsError(
            f"got {target}, which holds a checkpoint ({', '.join(weights[:3])}); "
            "choose another directory, or overwrite=True"
        )


def is_hqq_checkpoint(directory: Path) -> bool:
    """Whether the weights in `directory` are an hqq checkpoint, by its config or by the names of its tensors."""
    if (directory / TORCH).exists():
        return True
    if (directory / CONFIG).exists():
        try:
            quantization = read_json(directory / CONFIG).get("quantization_config")
        except CheckpointError:
            quantization = None
        if isinstance(quantization, dict) and quantization.get("quant_method") == "hqq":
            return True
    return any(_has_codes(file) for file in directory.glob("model*.safetensors"))


def _has_codes(file: Path) -> bool:
    try:
        with safe_open(str(file), framework="pt") as opened:
            return any(key.endswith(".W_q") for key in opened.keys())  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError):
        return False
