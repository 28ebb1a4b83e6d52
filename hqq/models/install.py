"""Making a quantised layer, putting it in the place of every module that used its weight, and saying what it is."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from hqq.core.config import QuantConfig
from hqq.core.embedding import HQQEmbedding
from hqq.core.experts import ExpertWeight, HQQExperts
from hqq.core.linear import HQQLinear
from hqq.core.modules import replace_module
from hqq.core.quantized_module import QuantizedModule
from hqq.models.plan import Job, Member
from hqq.models.report import LayerRow
from hqq.models.sharing import sharing_layer


def main_member(job: Job) -> Member:
    """Return the user of the job's weight that it is quantised for; the others share."""
    return next((m for m in job.members if m.kind == "linear"), job.members[0])


def quantized(
    module: nn.Module, config: QuantConfig, dtype: torch.dtype, device: torch.device
) -> QuantizedModule:
    """Return the quantised form of a linear layer, an embedding or fused experts."""
    if isinstance(module, nn.Embedding):
        return HQQEmbedding.from_embedding(module, config.to_dict(), compute_dtype=dtype, device=device)
    if isinstance(module, ExpertWeight):
        return HQQExperts.from_weights(module.weight, config.to_dict(), compute_dtype=dtype, device=device)
    return HQQLinear(module, config.to_dict(), compute_dtype=dtype, device=device)


def install(
    model: nn.Module, job: Job, layer: QuantizedModule, error: float | None, seconds: float
) -> list[LayerRow]:
    """Replace every module that uses the job's weight, and return their rows of the report."""
    main, rows = main_member(job), []
    for member in job.members:
        new = layer if member is main else sharing_layer(layer, member.module)
        new.train(member.module.training)
        replace_module(model, member.names, new)
        rows.append(layer_row(member.names[0], member.kind, new, error, seconds))
    return as_shared(rows, job.name)


def as_shared(rows: list[LayerRow], source: str) -> list[LayerRow]:
    """Return the rows of one weight's users: the first takes its bytes and time, the others share them."""
    others = [row for row in rows if row.name != source]
    return [rows[0], *(replace(row, bytes=0, seconds=0.0, shared_with=source) for row in others)]


def layer_row(
    name: str, kind: str, layer: QuantizedModule, error: float | None = None, seconds: float = 0.0
) -> LayerRow:
    """Return the report's row of a quantised layer."""
    q = layer.qtensor()
    size = q.nbytes + (layer.bias.nbytes if layer.bias is not None else 0)
    return LayerRow(
        name, kind, layer.stored_shape(), q.spec.nbits, q.spec.group_size, q.spec.axis, size, error, seconds
    )


def relative_error(W: Tensor, layer: QuantizedModule) -> float:
    """Return the Frobenius norm of (`W` - dequantised), relative to that of `W`."""
    W = W.to(layer.device, torch.float32)
    norm = float(torch.linalg.vector_norm(W))
    difference = float(torch.linalg.vector_norm(layer.dequantize().float() - W))
    return difference / norm if norm else difference
