"""Where the parts of a model go: one device, blocks spread over several, or devices by block name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from hqq.core.devices import DeviceLike, resolve_device
from hqq.core.modules import find_module, is_leaf, named_sites
from hqq.core.quantized_module import QuantizedModule
from hqq.errors import ConfigError

DeviceMap = DeviceLike | Sequence[DeviceLike] | Mapping[str, DeviceLike]


class Placement:
    """The device of each module, by the longest prefix of its name; none for a module that stays where it is."""

    def __init__(self, device_of_prefix: Mapping[str, torch.device]) -> None:
        self._device_of_prefix = dict(device_of_prefix)

    def device_of(self, name: str) -> torch.device | None:
        """Return the device of the module called `name`, or None to leave it."""
        while True:
            if name in self._device_of_prefix:
                return self._device_of_prefix[name]
            if not name:
                return None
            name = name.rpartition(".")[0]

    @property
    def prefixes(self) -> list[str]:
        """The names that devices were given for."""
        return list(self._device_of_prefix)

    @property
    def is_spread(self) -> bool:
        """Whether inputs have to be moved between devices."""
        return len(self._device_of_prefix) > 1


def plan_placement(model: nn.Module, device: DeviceMap) -> Placement:
    """Return where the modules of `model` go.

    Args:
        device: None to leave everything in place; one device; a list of devices, over which the model's blocks are
            spread in order; or {module name: device}.

    Raises ConfigError for an unknown name, an empty list, or a list for a model without blocks.
    """
    if device is None:
        return Placement({})
    if isinstance(device, Mapping):
        unknown = [name for name in device if find_module(model, name) is None]
        if unknown or not device:
            children = ", ".join(name for name, _ in model.named_children())
            raise ConfigError(f"got devices for {unknown}; expected module names, such as {children}")
        return Placement({name: resolve_device(target) for name, target in device.items()})
    if isinstance(device, (str, int, torch.device)):
        return Placement({"": resolve_device(device)})
    devices = [resolve_device(target) for target in device]
    if not devices:
        raise ConfigError(
            "got an empty list of devices; expected at least one, or None to leave the model in place"
        )
    if len(devices) == 1:
        return Placement({"": devices[0]})
    return _spread(model, devices)


def block_names(model: nn.Module) -> list[str]:
    """Return the names of the model's blocks: the members of its outermost ModuleLists and Sequentials."""
    blocks: list[str] = []
    for module, names in named_sites(model).items():
        inside = any(names[0] == block or names[0].startswith(f"{block}.") for block in blocks)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1 and not inside:
            prefix = f"{names[0]}." if names[0] else ""
            blocks.extend(prefix + child for child, _ in module.named_children())
    return blocks


def _spread(model: nn.Module, devices: list[torch.device]) -> Placement:
    blocks = block_names(model)
    if not blocks:
        raise ConfigError(
            f"got {len(devices)} devices for {type(model).__name__}, which has no list of blocks to spread over them; "
            "use {module name: device}"
        )
    placed = {block: devices[i * len(devices) // len(blocks)] for i, block in enumerate(blocks)}
    prefixes: dict[str, torch.device] = {}
    current = devices[0]
    for module, names in named_sites(model).items():
        name = names[0]
        if name in placed:
            current = placed[name]
            prefixes[name] = current
        elif any(name.startswith(f"{block}.") for block in blocks):
            continue
        elif next(module.parameters(recurse=False), None) is not None:
            prefixes[name] = current
        elif is_leaf(module):
            # Nothing but buffers, such as rotary angles: they meet the hidden states before the first block.
            prefixes[name] = devices[0]
    return Placement(prefixes)


def settle_tensors(model: nn.Module, placement: Placement, compute_dtype: torch.dtype | None) -> None:
    """Move what was not quantised to its device and, if given, cast it to `compute_dtype`, in place.

    Shared tensors stay shared (the first owner decides). Buffers that are not saved with the model, such as rotary
    frequencies, keep their dtype: they are constants that were computed at the precision they need.
    """
    done: dict[int, Tensor] = {}
    for module, names in named_sites(model).items():
        target = placement.device_of(names[0])
        if isinstance(module, QuantizedModule):
            continue
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in done:
                done[id(parameter)] = parameter
                parameter.data = _cast(parameter.data, target, compute_dtype)
                if parameter.grad is not None:
                    parameter.grad = None
        for name, buffer in list(module._buffers.items()):
            if buffer is None:
                continue
            if id(buffer) not in done:
                lasting = name not in module._non_persistent_buffers_set
                done[id(buffer)] = _cast(buffer, target, compute_dtype if lasting else None)
            module._buffers[name] = done[id(buffer)]


def _cast(tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(
        device or tensor.device, dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    )


def follow_inputs(model: nn.Module, placement: Placement) -> None:
    """Make every placed module move its inputs to its own device first; nothing to do on one device."""
    if not placement.is_spread:
        return
    for prefix in placement.prefixes:
        module = find_module(model, prefix)
        tensor = _first_tensor(module) if module is not None else None
        if module is not None and tensor is not None and prefix:
            module.register_forward_pre_hook(InputMover(tensor.device), with_kwargs=True)


def _first_tensor(module: nn.Module) -> Tensor | None:
    return next(chain(module.parameters(), module.buffers()), None)


class InputMover:
    """A forward pre-hook that moves every tensor among the inputs to one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return self._move(args), self._move(kwargs)

    def _move(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self.device)
        if type(value) in (tuple, list):
            return type(value)(self._move(item) for item in value)
        if type(value) is dict:
            return {key: self._move(item) for key, item in value.items()}
        return value
