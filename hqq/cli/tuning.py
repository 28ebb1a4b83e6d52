"""`hqq tune`: measure how the fused kernels should cut the products of a model on this GPU, and keep that."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch

from hqq.cli.output import Output, table
from hqq.core.bitpack import FORMAT_OF_BITS
from hqq.core.qtensor import QSpec
from hqq.errors import BackendError, ConfigError
from hqq.kernels.cuda import unavailable_reason
from hqq.kernels.tiled_gemv_config import MAX_TOKENS
from hqq.kernels.tiled_tune import random_weight, tune
from hqq.kernels.tiled_weight import tiled_support
from hqq.models.checkpoint import describe_checkpoint
from hqq.models.progress import progress_bar

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Product:
    """One kind of product to measure."""

    spec: QSpec
    tokens: int


def run(args: argparse.Namespace) -> Output:
    """Return a row for each product: the configuration that was fastest, and its time."""
    device = _numbered(torch.device(args.device or "cuda"))
    reason = unavailable_reason(device)
    if reason is not None:
        raise BackendError(f"got nothing to tune on {device}: {reason}")
    dtype = _DTYPES["bfloat16" if args.dtype == "auto" else args.dtype]
    products = _products(args, dtype)
    rows: list[dict[str, Any]] = []
    with progress_bar(len(products), "Tuning", not args.quiet) as bar:
        for product in products:
            rows.append(_tuned(product, dtype, device))
            bar.update()
    return Output({"device": torch.cuda.get_device_name(device), "products": rows}, _text(rows))


def _numbered(device: torch.device) -> torch.device:
    """Return the current one of the devices that "cuda" without a number leaves open."""
    if str(device) == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _products(args: argparse.Namespace, dtype: torch.dtype) -> list[Product]:
    """Return the products of the checkpoint's layers, and those of further shapes with the layers' settings."""
    specs = {
        QSpec(row.nbits, row.shape, row.group_size, row.axis, FORMAT_OF_BITS[row.nbits])
        for row in describe_checkpoint(args.path)
        if len(row.shape) == 2
    }
    settings = {(spec.nbits, spec.group_size, spec.axis, spec.packing) for spec in specs}
    for shape in args.shape or ():
        specs |= {QSpec(nbits, shape, size, axis, packing) for nbits, size, axis, packing in settings}
    usable = sorted(
        (spec for spec in specs if tiled_support(spec, dtype) is None),
        key=lambda spec: (spec.shape, spec.nbits, spec.axis),
    )
    if not usable:
        raise ConfigError(f"got {args.path!r}, which has no layer that the fused kernels take")
    for tokens in args.tokens:
        if not 1 <= tokens <= MAX_TOKENS:
            raise ConfigError(f"got --tokens {tokens}; expected 1 to {MAX_TOKENS}")
    return [Product(spec, tokens) for spec in usable for tokens in args.tokens]


def _tuned(product: Product, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    times: list[float] = []
    weight = random_weight(product.spec, dtype, device)
    best = tune(weight, product.tokens, lambda config, microseconds: times.append(microseconds))
    spec = product.spec
    return {
        "shape": list(spec.shape),
        "nbits": spec.nbits,
        "group_size": spec.group_size,
        "axis": spec.axis,
        "tokens": product.tokens,
        "chosen_us": times[0],
        "tuned_us": min(times),
        "config": best._asdict(),
    }


def _text(rows: list[dict[str, Any]]) -> str:
    header = ["shape", "bits", "group", "axis", "tokens", "before, us", "tuned, us"]
    cells = [
        [
            "x".join(map(str, row["shape"])),
            f"{row['nbits']}",
            "channel" if row["group_size"] is None else f"{row['group_size']}",
            f"{row['axis']}",
            f"{row['tokens']}",
            f"{row['chosen_us']:.1f}",
            f"{row['tuned_us']:.1f}",
        ]
        for row in rows
    ]
    return table(header, cells)
