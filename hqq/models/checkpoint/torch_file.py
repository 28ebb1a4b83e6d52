"""qmodel.pt: {module name: state} of raw Python types, as AutoHQQHFModel.save_quantized writes it."""

from __future__ import annotations

import pickle
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqq.core.layer_state import layer_state
from hqq.core.linear import HQQLinear
from hqq.errors import CheckpointError, CorruptCheckpointError, MissingKeysError
from hqq.models.checkpoint.disk import Disk
from hqq.models.checkpoint.layout import TORCH
from hqq.models.checkpoint.source import LayerState, Source, state_bytes


def write_torch(directory: Path, source: Source, disk: Disk) -> None:
    """Write `source` as qmodel.pt into `directory`. torch.save stores a tensor that several names share once."""
    disk.write_torch(directory / TORCH, state_by_module(source))


def state_by_module(source: Source) -> dict[str, dict[str, Any]]:
    """Return {module name: state} of `source` on the CPU, layers as raw Python types."""
    modules: dict[str, dict[str, Any]] = {}
    values: dict[str, Any] = {}
    for name in source.units:
        if name in source.layers:
            values[name] = {key: _on_cpu(value) for key, value in source.layer(name).items()}
            modules[name] = values[name]
        else:
            values[name] = _on_cpu(source.tensor(name))
            _put(modules, name, values[name])
    for alias, name in source.shared.items():
        if name in source.layers:
            own = modules.get(alias, {})
            modules[alias] = {**{key: value for key, value in values[name].items() if key != "bias"}, **own}
        else:
            _put(modules, alias, values[name])
    return modules


def _put(modules: dict[str, dict[str, Any]], name: str, tensor: Tensor) -> None:
    module, _, key = name.rpartition(".")
    modules.setdefault(module, {})[key] = tensor


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _on_cpu(item) for key, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    value = value.detach().to("cpu")
    # A view would take its whole storage into the file.
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


# What reading a damaged file ends in, depending on where the damage is.
_DAMAGE = (
    RuntimeError,
    EOFError,
    KeyError,
    IndexError,
    ValueError,
    OSError,
    NotImplementedError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,  # a flag of the file says that it is compressed
)


class TorchSource:
    """The units of the qmodel.pt in `directory`; `mapped` leaves tensors on disk until they are used.

    Raises CorruptCheckpointError for a file that torch cannot read or that is not {module name: state}.
    """

    def __init__(self, directory: Path, mapped: bool = False) -> None:
        self._modules = _read(directory / TORCH, mapped)
        self.units: dict[str, int] = {}
        self.shared: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._tensors: dict[str, Tensor] = {}
        first: dict[tuple[int, tuple[int, ...], torch.dtype], str] = {}
        for module, state in self._modules.items():
            if "W_q" in state:
                self._note(module, state["W_q"], state_bytes(state), first)
                continue
            for key, tensor in state.items():
                name = f"{module}.{key}" if module else key
                self._tensors[name] = tensor
                self.shapes[name] = tuple(tensor.shape)
                self._note(name, tensor, tensor.nbytes, first)
        self.layers = frozenset(name for name in self.units if name not in self._tensors)
        for alias, name in self.shared.items():
            if name in self.layers and "bias" in self._modules[alias]:
                self._tensors[f"{alias}.bias"] = self._modules[alias]["bias"]
                self.shapes[f"{alias}.bias"] = tuple(self._modules[alias]["bias"].shape)
                self.units[f"{alias}.bias"] = self._modules[alias]["bias"].nbytes

    def layer(self, name: str) -> LayerState:
        state = self._modules[name]
        return _today(state) if "meta" in state else dict(state)

    def layer_outline(self, name: str) -> LayerState:
        """Return a layer's state; the tensors in it are not read if the file is mapped."""
        return self.layer(name)

    def layer_bytes(self, name: str) -> int:
        """Return the bytes of a layer's codes, scale, zero and bias."""
        return self.units[name]

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def _note(
        self, name: str, tensor: Tensor, size: int, first: dict[tuple[int, tuple[int, ...], torch.dtype], str]
    ) -> None:
        identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)
        known = first.setdefault(identity, name) if tensor.numel() else name
        if known == name:
            self.units[name] = size
        else:
            self.shared[name] = known


def _today(state: Mapping[str, Any]) -> LayerState:
    """Return the state of a layer of 0.1.x in today's form."""
    layer = HQQLinear(
        None, None, compute_dtype=state["meta"].get("compute_dtype", torch.float16), device="cpu"
    )
    layer.load_state_dict(state, strict=False)
    return layer_state(layer, encoded=False)


def _read(path: Path, mapped: bool) -> dict[str, dict[str, Any]]:
    try:
        if not mapped:
            _check_sums(path)
        modules = _load(path, mapped)
    except (PermissionError, IsADirectoryError) as error:
        raise CheckpointError(f"got {path}, which cannot be read: {error}") from error
    except CorruptCheckpointError:
        raise
    except _DAMAGE as error:
        reason = str(error).partition("\n")[0]
        raise CorruptCheckpointError(
            f"got {path}, which torch cannot read as plain tensors and values ({reason}); restore or download it again"
        ) from error
    if not isinstance(modules, dict) or not all(isinstance(state, Mapping) for state in modules.values()):
        raise CorruptCheckpointError(
            f"got {path} with a {type(modules).__name__}; expected {{module name: state}}"
        )
    for module, state in modules.items():
        if "W_q" not in state and "nbits" in state:
            raise MissingKeysError(f"{module}: got a layer's state without W_q; expected its codes")
        strays = [key for key, value in state.items() if "W_q" not in state and not isinstance(value, Tensor)]
        if strays:
            raise CorruptCheckpointError(
                f"{module}: got values that are no tensors: {', '.join(map(str, strays))}"
            )
    return modules


def _check_sums(path: Path) -> None:
    """Raise CorruptCheckpointError if a part of the file fails its checksum, which torch does not look at."""
    if not zipfile.is_zipfile(path):
        return  # the format before zip had no checksums
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged is not None:
        raise CorruptCheckpointError(
            f"got {path}, whose part {damaged} fails its checksum; the file was damaged after it was written (or "
            "written without checksums): restore or download it again"
        )


def _load(path: Path, mapped: bool) -> Any:
    with warnings.catch_warnings():
        # Bytes that are no pickle at all may look like one of an unknown protocol: the error that follows says enough.
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        if mapped:
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:
                pass  # written without zip, which cannot be mapped, or damaged: the plain way tells
        return torch.load(path, map_location="cpu", weights_only=True)
