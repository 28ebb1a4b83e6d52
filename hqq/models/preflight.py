"""Checks of every layer before the first is touched."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from hqq.core.bitpack import FORMAT_OF_BITS
from hqq.core.config import QuantConfig
from hqq.core.dtypes import check_compute_dtype
from hqq.core.qtensor import QSpec
from hqq.errors import ConfigError, DtypeError, HQQError, ShapeError, WeightError
from hqq.models.placement import Placement
from hqq.models.plan import Job
from hqq.models.streaming import is_streamed


def check_jobs(jobs: Iterable[Job], compute_dtype: torch.dtype | None, placement: Placement) -> None:
    """Raise ConfigError, DtypeError, ShapeError or WeightError, naming the layer, for the first that cannot be done.

    Weights that go from the CPU to a GPU are not read: that would take as long as copying them, and whoever solves
    them there finds what is not finite.
    """
    weights = []
    for job in jobs:
        weight = job.members[0].module.weight
        assert isinstance(weight, Tensor)
        with ErrorsName(job.name):
            _check_weight(weight)
            _check_config(weight, job.config, check_compute_dtype(compute_dtype or weight.dtype))
        if not is_streamed(weight, placement.device_of(job.name)):
            weights.append((job.name, weight))
    _check_finite(weights)


class ErrorsName:
    """A context that puts the layer's name before the message of an HQQError."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, HQQError):
            raise type(error)(f"{self._name}: {error}") from error


def _check_weight(weight: Tensor) -> None:
    if weight.is_meta:
        raise WeightError("got a weight on the meta device; load the model's weights before quantising it")
    if not weight.dtype.is_floating_point:
        raise DtypeError(f"got a weight of {weight.dtype}; expected a floating-point dtype")
    if weight.numel() == 0:
        raise ShapeError(f"got an empty weight of shape {tuple(weight.shape)}; expected at least one element")


def _check_config(weight: Tensor, config: QuantConfig, compute_dtype: torch.dtype) -> None:
    matrix = tuple(weight.shape[-2:])  # of experts, each matrix is quantised by itself
    group_size = config.group_size if config.group_size is not None else matrix[1 if config.axis == 1 else 0]
    spec = QSpec(config.nbits, matrix, group_size, config.axis, FORMAT_OF_BITS[config.nbits])
    fmt = spec.format
    if (
        config.view_as_float
        and fmt is not None
        and spec.packed_shape[-1] * fmt.dtype.itemsize % compute_dtype.itemsize
    ):
        raise ConfigError(
            f"got view_as_float with rows of {spec.packed_shape[-1] * fmt.dtype.itemsize} bytes, which {compute_dtype} "
            "does not divide; use a larger group_size, the other axis, or view_as_float=False"
        )


def _check_finite(weights: list[tuple[str, Tensor]]) -> None:
    """Raise WeightError for NaN or infinity. One read of every weight, and one transfer per device at the end."""
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, weight in weights:
        low, high = torch.aminmax(weight.detach())
        by_device.setdefault(weight.device, []).append((name, torch.stack((low, high))))
    for entries in by_device.values():
        finite = torch.isfinite(torch.stack([ends for _, ends in entries])).all(1)
        for (name, _), ok in zip(entries, finite.tolist(), strict=True):
            if not ok:
                raise WeightError(
                    f"{name}: got a weight with NaN or infinity; expected finite values. Check how the model was "
                    "loaded or trained, or leave the layer out with skip"
                )


def resolved_solver(config: QuantConfig, default: str) -> QuantConfig:
    """Return `config` with the solver it will use named."""
    return replace(config, solver=config.solver or default) if config.optimize else config
