"""Quantising one tensor: the `Quantizer` class, under the names and conventions of the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hqq.core.bitpack import FORMAT_OF_BITS, FORMATS, SUPPORTED_BITS, BitPack, check_nbits, max_code, pack
from hqq.core.cache import CACHE_DIMS, cache_group_size
from hqq.core.devices import DeviceLike, resolve_device
from hqq.core.dtypes import check_compute_dtype
from hqq.core.meta import spec_from_meta, stat_from_meta
from hqq.core.qtensor import QSpec, QTensor
from hqq.core.solvers import DEFAULT_SOLVER, Solution, get_solver
from hqq.core.solvers.fused import solve_fused
from hqq.core.solvers.legacy import optimize_weights_proximal, solve_with
from hqq.core.solvers.min_max import solve_min_max
from hqq.core.wire import NESTED_KEYS
from hqq.errors import ConfigError, DtypeError, ShapeError, WeightError

Meta = dict[str, Any]


def quantize_tensor(
    tensor: Tensor,
    *,
    nbits: float = 4,
    channel_wise: bool = True,
    group_size: int | None = 64,
    optimize: bool = True,
    round_zero: bool = False,
    axis: int = 0,
    solver: str | None = None,
    storage_dtype: torch.dtype = torch.float32,
    optimize_weights: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None,
    zero_mode: str | None = None,
    importance: Tensor | None = None,
) -> QTensor:
    """Quantise a floating-point tensor of any shape.

    Args:
        tensor: float tensor, any device; not changed.
        nbits, channel_wise, group_size, axis: see `QSpec`.
        optimize: run the solver called `solver`; False rounds to nearest.
        round_zero: start from integer zeros.
        storage_dtype: dtype scale and zero will be cast to; the lattice is chosen for what it can hold.
        optimize_weights: a function in the original's convention that replaces the solver.
        zero_mode: which zeros solver="als" may choose, see `solve_als`; None for any number.
        importance: weights of the squared error for solver="als", of a shape that broadcasts to the tensor's, such as
            [K] for the inputs of a linear layer.

    Returns a QTensor with packed codes and float32 scale and zero. Raises ConfigError, DtypeError, ShapeError or
    WeightError for what cannot be quantised.
    """
    if not tensor.dtype.is_floating_point:
        raise DtypeError(f"got a weight of {tensor.dtype}; expected a floating-point dtype")
    if tensor.numel() == 0:
        raise ShapeError(f"got an empty weight of shape {tuple(tensor.shape)}; expected at least one element")
    nbits = check_nbits(nbits)
    spec = QSpec(
        nbits, tuple(tensor.shape), group_size, axis, FORMAT_OF_BITS[nbits], channel_wise=channel_wise
    )
    solver = solver or DEFAULT_SOLVER
    get_solver(solver)
    usual = zero_mode is None or (zero_mode == "float" and solver == "als" and optimize)
    if channel_wise and importance is None and usual and not (optimize and optimize_weights is not None):
        fused = solver if optimize else "minmax"
        q = solve_fused(tensor, spec, fused, storage_dtype=storage_dtype, round_zero=round_zero)
        if q is not None:
            return q
    W = spec.grouping.group(tensor.detach().float())
    dim = axis if channel_wise else None
    options: dict[str, Any] = {"round_zero": round_zero, "storage_dtype": storage_dtype}
    if zero_mode is not None or importance is not None:
        chosen = solver if optimize and optimize_weights is None and channel_wise else None
        if chosen != "als":
            raise ConfigError(
                "got zero_mode or importance without the solver that knows them; "
                "expected solver='als', optimize=True and channel_wise=True"
            )
        options["zero_mode"] = zero_mode or "float"
        options["importance"] = None if importance is None else _grouped_importance(importance, W, spec)
    solution = _solve(W, dim, spec, optimize, solver, optimize_weights, options)
    codes = pack(solution.codes, FORMATS[FORMAT_OF_BITS[nbits]]) if W.ndim else solution.codes.to(torch.uint8)
    return QTensor(codes, solution.scale, solution.zero, spec)


def _grouped_importance(importance: Tensor, W: Tensor, spec: QSpec) -> Tensor:
    try:
        weights = importance.detach().to(W).broadcast_to(spec.shape)
    except RuntimeError:
        raise ShapeError(
            f"got importance of shape {tuple(importance.shape)}; expected one that broadcasts to the weight's, "
            f"{spec.shape}, such as [{spec.shape[-1]}] for one value per input"
        ) from None
    return spec.grouping.group(weights)


def _solve(
    W: Tensor,
    dim: int | None,
    spec: QSpec,
    optimize: bool,
    solver: str | None,
    optimize_weights: Callable[..., tuple[Tensor, Tensor, Tensor]] | None,
    options: Mapping[str, Any],
) -> Solution:
    solve = get_solver(solver)
    if not optimize or dim is None:
        return solve_min_max(W, dim, max_code(spec.nbits), **options)
    if optimize_weights is not None:
        return solve_with(optimize_weights, W, dim, max_code(spec.nbits), **options)
    return solve(W, dim, max_code(spec.nbits), **options)


class Quantizer:
    """Quantise, dequantise and move tensors described by a `meta` dict.

    `meta` has the keys nbits, group_size, shape, scale, zero, axis, packing, unpack_view_dtype, view_as_float and,
    where set, compute_dtype. `optimize_weights` may be replaced by a function of the original's signature
    `(tensor, scale, zero, min_max, axis, device) -> (W_q, scale, zero)` (scale inverted); left alone, the solver that
    the configuration names is used.
    """

    optimize_caches = False
    SUPPORTED_BITS = list(SUPPORTED_BITS)
    optimize_weights = staticmethod(optimize_weights_proximal)
    bit_to_packing = dict(FORMAT_OF_BITS)
    pack = {name: getattr(BitPack, f"pack_{name}") for name in FORMATS}
    unpack = {name: getattr(BitPack, f"unpack_{name}") for name in FORMATS}
    unpack_view_dtype = {name: fmt.dtype for name, fmt in FORMATS.items()}

    @classmethod
    def quantize(
        cls,
        tensor: Tensor,
        nbits: float = 4,
        channel_wise: bool = True,
        group_size: int | None = 64,
        optimize: bool | None = None,
        round_zero: bool = False,
        axis: int = 0,
        bitpack: bool = True,
        compute_dtype: torch.dtype | None = None,
        view_as_float: bool = False,
        device: DeviceLike = None,
        solver: str | None = None,
        zero_mode: str | None = None,
        importance: Tensor | None = None,
    ) -> tuple[Tensor, Meta]:
        """Quantise `tensor` (any shape) and return `(W_q, meta)`; see `quantize_tensor`.

        compute_dtype: the dtype that scale and zero will be used in, and that packed codes are viewed as under
        view_as_float (float32 without it). device: where to solve and leave the result; None: the tensor's own.
        bitpack=False leaves one code per element in the tensor's dtype. optimize=None runs the solver, but
        not (unless one is named) for tensors of four dimensions: those are the key-value caches of transformers, which
        calls without it at every flush. `Quantizer.optimize_caches = True` solves those too. Their group size is
        fitted to the shape.
        """
        if optimize is None:
            is_cache = tensor.ndim == CACHE_DIMS and solver is None
            optimize = cls.optimize_caches or not is_cache
            group_size = cache_group_size(tensor.shape, group_size) if is_cache else group_size
        if compute_dtype is not None:
            check_compute_dtype(compute_dtype)
        if tensor.device.type == "meta":
            raise WeightError("got a weight on the meta device, which holds no values; load it first")
        replaced = cls.optimize_weights if cls.optimize_weights is not optimize_weights_proximal else None
        q = quantize_tensor(
            tensor.to(resolve_device(device, tensor.device)),
            nbits=nbits,
            channel_wise=channel_wise,
            group_size=group_size,
            optimize=optimize,
            round_zero=round_zero,
            axis=axis,
            solver=solver,
            storage_dtype=compute_dtype or torch.float32,
            optimize_weights=replaced,
            zero_mode=zero_mode,
            importance=importance,
        )
        W_q, packing = q.W_q, q.spec.packing
        if not bitpack:
            W_q, packing = q.codes(tensor.dtype), None
        elif view_as_float:
            W_q = view_codes_as_float(W_q, compute_dtype or torch.float32)
        meta: Meta = {
            "nbits": q.spec.nbits,
            "group_size": group_size,
            "shape": tensor.shape,
            "scale": q.scale,
            "zero": q.zero,
            "axis": axis,
            "packing": packing,
            "unpack_view_dtype": cls.unpack_view_dtype[q.spec.packing or cls.bit_to_packing[nbits]],
            "view_as_float": view_as_float,
        }
        return W_q, meta

    @classmethod
    def dequantize(cls, W_q: Tensor, meta: Meta) -> Tensor:
        """Return the tensor of meta["shape"] that `W_q` and `meta` describe, in meta's compute dtype (or float16)."""
        q = QTensor(W_q, stat_from_meta(meta, "scale"), stat_from_meta(meta, "zero"), spec_from_meta(meta))
        return q.dequantize(meta.get("compute_dtype") or torch.float16)

    @classmethod
    def to_inplace(cls, W_q: Tensor | None, meta: Meta, device: DeviceLike) -> tuple[Tensor | None, Meta]:
        """Move `W_q` and cast and move every tensor in `meta`, which is changed, and return both."""
        moved, converted = cls.to_ooplace(W_q, meta, device)
        meta.update(converted)
        return moved, meta

    @classmethod
    def to_ooplace(cls, W_q: Tensor | None, meta: Meta, device: DeviceLike) -> tuple[Tensor | None, Meta]:
        """Return `W_q` on `device`, and a new meta whose float tensors are in the compute dtype there."""
        target = resolve_device(device)
        compute_dtype = meta.get("compute_dtype") or torch.float16
        converted: Meta = {}
        for key, value in meta.items():
            if isinstance(value, Tensor):
                cast = value.is_floating_point() and not key.endswith("_q")
                converted[key] = value.to(target, compute_dtype if cast else value.dtype).contiguous()
            elif key in NESTED_KEYS:
                converted[key] = cls.to_ooplace(None, {"compute_dtype": compute_dtype, **value}, target)[1]
            else:
                converted[key] = value
        return (None if W_q is None else W_q.to(target).contiguous()), converted

    @classmethod
    def cuda(cls, W_q: Tensor | None, meta: Meta, device: DeviceLike) -> tuple[Tensor | None, Meta]:
        """Same as `to_inplace`: callers rely on `meta` itself being changed."""
        return cls.to_inplace(W_q, meta, device)

    @classmethod
    def cpu(cls, W_q: Tensor | None, meta: Meta) -> tuple[Tensor | None, Meta]:
        """Same as `to_ooplace` with the CPU as device."""
        return cls.to_ooplace(W_q, meta, "cpu")


def view_codes_as_float(W_q: Tensor, dtype: torch.dtype) -> Tensor:
    """Return packed codes as a tensor of `dtype` over the same bytes; raises ConfigError if they do not line up."""
    if (W_q.shape[-1] * W_q.element_size()) % dtype.itemsize:
        raise ConfigError(
            f"got view_as_float with rows of {W_q.shape[-1] * W_q.element_size()} bytes, which {dtype} does not "
            f"divide; use a larger group_size, the other axis, or view_as_float=False"
        )
    return W_q.contiguous().view(dtype)
