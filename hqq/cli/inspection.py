"""`hqq inspect`: what a checkpoint holds, layer by layer."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqq.cli.output import Output, number, size, table
from hqq.core.linear import HQQLinear
from hqq.core.modules import find_module
from hqq.errors import CheckpointError, ShapeError
from hqq.models.checkpoint import CheckpointDescription, describe_checkpoint
from hqq.models.checkpoint.load import open_source
from hqq.models.load import open_full
from hqq.models.progress import progress_bar
from hqq.models.report import LayerRow


def run(args: argparse.Namespace) -> Output:
    """Return a row per layer and the totals."""
    description = describe_checkpoint(args.path)
    if not description.layers:
        raise CheckpointError(
            f"got {args.path!r}, which holds no quantised layer; expected an hqq checkpoint"
        )
    errors: dict[str, float] = {}
    if args.reference is not None:
        errors = _errors(description, args.reference, progress=not args.quiet)
    data = description.to_dict()
    data["path"], data["reference"] = args.path, args.reference
    for layer in data["layers"]:
        layer["error"] = errors.get(layer["name"])
    return Output(data, _text(description, errors))


def _text(description: CheckpointDescription, errors: Mapping[str, float]) -> str:
    header = [
        "layer",
        "shape",
        "bits",
        "group",
        "axis",
        "size",
        "bits/weight",
        *(["error"] if errors else []),
    ]
    rows = [_cells(row, errors) for row in description.layers]
    quantised = [row for row in description.layers if row.shared_with is None]
    stored, weights = sum(row.bytes for row in quantised), sum(prod(row.shape) for row in quantised)
    others = sum(row.bytes for row in description.tensors)
    lines = [
        table(header, rows),
        "",
        f"{len(quantised)} quantised layers   {size(stored)}, {8 * stored / weights:.3f} bits per weight",
        f"{len(description.tensors)} other tensors      {size(others)}",
        f"whole model ({description.format})   {size(description.bytes)} for {description.weights:,} weights, "
        f"{description.effective_bits:.3f} bits per weight",
    ]
    return "\n".join(lines)


def _cells(row: LayerRow, errors: Mapping[str, float]) -> list[str]:
    shared = row.shared_with is not None
    return [
        row.name,
        "x".join(map(str, row.shape)),
        f"{row.nbits}",
        "channel" if row.group_size is None else f"{row.group_size}",
        f"{row.axis}",
        "shared" if shared else size(row.bytes),
        "" if shared else f"{8 * row.bytes / prod(row.shape):.3f}",
        *([number(errors[row.name])] if errors else []),
    ]


@torch.inference_mode()
def _errors(description: CheckpointDescription, reference: str, progress: bool) -> dict[str, float]:
    """Return, by layer, the Frobenius norm of (W - dequantised) over that of the reference's W."""
    model = open_full(reference, progress=progress)
    source = open_source(Path(description.path), mapped=True)
    errors: dict[str, float] = {}
    with progress_bar(len(description.layers), "Comparing", progress) as bar:
        for row in description.layers:
            original = getattr(find_module(model, row.name), "weight", None)
            if not isinstance(original, Tensor) or original.shape != row.shape:
                found = tuple(original.shape) if isinstance(original, Tensor) else "none"
                raise ShapeError(
                    f"got {found} as weight of {row.name} in {reference!r}; expected {tuple(row.shape)}"
                )
            errors[row.name] = _relative_error(original, source.layer(row.shared_with or row.name))
            bar.update()
    return errors


def _relative_error(original: Tensor, state: dict[str, Any]) -> float:
    layer = HQQLinear(None, None, compute_dtype=state.get("compute_dtype", torch.float16), device="cpu")
    layer.load_state_dict(state, strict=False)
    W = original.float()
    norm = float(torch.linalg.vector_norm(W))
    difference = float(torch.linalg.vector_norm(W - layer.dequantize().float()))
    return difference / norm if norm else difference
