"""How a layer multiplies: the names that can be asked for, and the choice of a backend that gives its reasons."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import torch

from hqq.core.backend import EAGER, HQQBackend, get_backend
from hqq.core.prepared import MatmulBackend
from hqq.core.qtensor import QSpec
from hqq.errors import BackendError

# Modules that hold a MatmulBackend as `MATMUL`, imported when first asked for: they may need libraries that are absent.
_MODULES: dict[str, str] = {
    "native": "hqq.backends.native",
    "torchao_int4": "hqq.backends.torchao_int4",
    "gemlite": "hqq.backends.gemlite",
    "marlin": "hqq.backends.marlin",
    "bitblas": "hqq.backends.bitblas",
    "cpu": "hqq.backends.cpu",
}

# What "default" stands for, by type of device, best first. Every list ends with the reference, which takes everything.
_DEFAULT: dict[str, tuple[str, ...]] = {
    "cuda": ("native", "triton", "pytorch"),
    "cpu": ("cpu", "pytorch"),
}
_REFERENCE = ("pytorch",)

# A backend that was asked for by name, and what takes its place for a layer that it does not take.
_INSTEAD: dict[str, tuple[str, ...]] = {
    "native": ("triton", "pytorch"),
    "triton": ("pytorch",),
    "cpu": ("pytorch",),
    "pytorch": (),
    "pytorch_compile": ("pytorch",),
}

# Names that several backends satisfy.
_MEANS: dict[str, tuple[str, ...]] = {
    "triton": ("native", "triton"),
    "default": ("native", "triton", "cpu", "pytorch"),
    "auto": ("native", "triton", "cpu", "pytorch"),
}

BACKEND_NAMES: tuple[str, ...] = (
    *("default", "auto", "native", "triton", "pytorch", "pytorch_compile"),
    *("torchao_int4", "gemlite", "marlin", "bitblas", "cpu"),
)
"""The names that `prepare_for_inference` takes."""

EXTERNAL = frozenset({"gemlite", "marlin", "bitblas"})
"""Backends that need a library of their own: asking for one that is not there is an error."""


@dataclass(frozen=True)
class Choice:
    """What one layer asked for and got; `reason` says why it is not a better one. `dequant` serves `dequantize`."""

    asked: str
    got: str
    reason: str | None
    dequant: HQQBackend
    matmul: MatmulBackend | None = None

    @property
    def fulfilled(self) -> bool:
        """Whether the layer has what was asked for."""
        return satisfies(self.asked, self.got)


def satisfies(asked: str, got: str) -> bool:
    """Whether a layer that got `got` has what was `asked` for."""
    return got in _MEANS.get(asked, (asked,))


def get_matmul_backend(name: str) -> MatmulBackend:
    """Return the backend called `name`; raises BackendError if there is none of that name."""
    if name not in _MODULES:
        raise BackendError(f"got matmul backend {name!r}; expected one of {', '.join(_MODULES)}")
    backend: MatmulBackend = import_module(_MODULES[name]).MATMUL
    return backend


def unavailable(name: str) -> str | None:
    """Return why backend `name` does not run on this machine, or None; raises BackendError for an unknown name."""
    if name in ("default", "auto"):
        return None
    return (get_matmul_backend(name) if name in _MODULES else get_backend(name)).available()


def check_asked(asked: str) -> None:
    """Raise BackendError for a name that there is not, or for a library that is not there."""
    if asked not in BACKEND_NAMES:
        raise BackendError(
            f"got backend={asked!r}, which this version of hqq does not have; expected one of "
            f"{', '.join(map(repr, BACKEND_NAMES))}"
        )
    reason = unavailable(asked) if asked in EXTERNAL else None
    if reason is not None:
        raise BackendError(f"got backend={asked!r}, which is not available here: {reason}")


def choose(
    asked: str,
    spec: QSpec,
    compute_dtype: torch.dtype,
    device: torch.device,
    *,
    only_dequantize: str | None = None,
    refused: tuple[tuple[str, str], ...] = (),
) -> Choice:
    """Return the best backend among those that `asked` stands for, and why not a better one.

    only_dequantize: why this weight cannot be prepared as a whole, if so; refused: backends, with their reasons, that
    have failed to prepare it.
    """
    reasons = dict(refused)
    for name in _candidates(asked, device.type):
        if name in reasons:
            continue
        reason = _refusal(name, spec, compute_dtype, device, only_dequantize)
        if reason is None:
            matmul = get_matmul_backend(name) if name in _MODULES else None
            why = "; ".join(dict.fromkeys(reasons.values())) or None
            return Choice(asked, name, why, _dequant(name, spec, compute_dtype, device), matmul)
        reasons[name] = reason
    raise AssertionError(f"the reference refused {spec}")


def _candidates(asked: str, device_type: str) -> tuple[str, ...]:
    default = _DEFAULT.get(device_type, _REFERENCE)
    if asked in ("default", "auto"):
        return default
    first = ("native", "triton") if asked == "triton" and device_type == "cuda" else (asked,)
    return tuple(dict.fromkeys((*first, *_INSTEAD.get(asked, default))))


def _refusal(
    name: str, spec: QSpec, dtype: torch.dtype, device: torch.device, only_dequantize: str | None
) -> str | None:
    if name not in _MODULES:
        backend = get_backend(name)
        return backend.available() or backend.supports(spec, dtype, device)
    matmul = get_matmul_backend(name)
    return only_dequantize or matmul.available() or matmul.supports(spec, dtype, device)


def _dequant(name: str, spec: QSpec, dtype: torch.dtype, device: torch.device) -> HQQBackend:
    """Return what dequantises the weight of a layer that multiplies with backend `name`."""
    if name not in _MODULES:
        return HQQBackend(name)
    if device.type == "cuda" and _refusal("triton", spec, dtype, device, None) is None:
        return HQQBackend.TRITON
    return HQQBackend(EAGER.name)
