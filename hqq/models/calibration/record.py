"""Seeing what goes into layers while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

# Called with the site's name, the inputs [..., K] and, for fused experts, the number of the expert.
OnInput = Callable[[str, Tensor, int | None], None]


class Enough(Exception):  # noqa: N818 - not an error
    """Raised to end a forward pass that has shown what it was run for."""


class Recorder:
    """A context in which `on_input` is told of every input of some layers.

    Args:
        layers: site name -> the modules that multiply with its weight.
        experts: site name -> fused expert weights [E, N, K]; slices of them are recognised in calls of F.linear.
        last: name of the site after whose inputs the pass may end (with Enough).
    """

    def __init__(
        self,
        layers: Mapping[str, Sequence[nn.Module]],
        experts: Mapping[str, Tensor],
        on_input: OnInput,
        last: str | None = None,
    ) -> None:
        self._layers, self._on_input, self._last = layers, on_input, last
        self._handles: list[RemovableHandle] = []
        self._watch = _ExpertWatch(experts, on_input) if experts else None

    def __enter__(self) -> Recorder:
        for name, modules in self._layers.items():
            for module in modules:
                self._handles.append(module.register_forward_pre_hook(self._hook(name)))
        if self._watch is not None:
            self._watch.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watch is not None:
            self._watch.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._on_input(name, args[0], None)
            if name == self._last:
                raise Enough

        return hook


class _ExpertWatch(TorchFunctionMode):
    def __init__(self, experts: Mapping[str, Tensor], on_input: OnInput) -> None:
        super().__init__()
        self._experts, self._on_input = experts, on_input

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight = (
                args[i] if len(args) > i else kwargs.get(key) for i, key in enumerate(("input", "weight"))
            )
            if isinstance(x, Tensor) and isinstance(weight, Tensor):
                self._look(x, weight)
        return func(*args, **kwargs)

    def _look(self, x: Tensor, weight: Tensor) -> None:
        for name, experts in self._experts.items():
            if weight.shape != experts.shape[1:] or weight.stride() != experts.stride()[1:]:
                continue
            offset = weight.data_ptr() - experts.data_ptr()
            size = experts.stride(0) * experts.element_size()
            if 0 <= offset < size * len(experts) and offset % size == 0:
                self._on_input(name, x, offset // size)
                return
