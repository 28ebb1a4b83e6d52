"""Weights on their way to the GPU: the next layers' are copied while this one's is solved."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

# Pageable memory goes through pinned buffers: while one is filled, the GPU reads the others.
_STAGED_BYTES = 16 << 20
_STAGES = 3
# So much may be ahead: the small layers of a block of the largest dense models, which take longer to solve than to
# copy, while their large ones take longer to copy.
_AHEAD_BYTES = 256 << 20


def is_streamed(weight: Tensor, device: torch.device | None) -> bool:
    """Whether `weight`, which goes to `device`, is one that a `WeightStream` copies."""
    return device is not None and device.type == "cuda" and weight.device.type == "cpu"


@contextmanager
def on_device(stream: WeightStream, weight: Tensor) -> Iterator[None]:
    """Put the prepared copy in the place of `weight`'s data; back in case of an error, so that nothing has changed."""
    # Nothing here may keep the weight alive: it is to go as soon as its codes exist.
    copy = stream.take(weight)
    if copy is weight:
        del weight, copy
        yield
        return
    original, weight.data = weight.data, copy
    held = weakref.ref(weight)
    del weight, copy
    try:
        yield
    except BaseException:
        left = held()
        if left is not None:
            left.data = original
        raise


@dataclass
class _Copy:
    """A weight on its device, complete once `done` has happened there."""

    tensor: Tensor
    done: torch.cuda.Event


class WeightStream:
    """Copies weights from the CPU to CUDA devices, ahead of the caller, on a stream and a thread of its own.

    Call `prepare` with the weights that come next and `take` when it is a weight's turn. Besides what the caller holds
    there is never more than one weight on a device, or 256 MiB of them, and 48 MiB of pinned memory. For weights that
    are where they should be, and for devices other than CUDA, both do nothing. A context manager: leaving it drops what
    was not taken.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._stages: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._pending: deque[tuple[Tensor, Future[_Copy]]] = deque()

    def __enter__(self) -> WeightStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._drop()
        if self._thread is not None:
            self._thread.shutdown()
        self._stages.clear()

    def prepare(self, weight: Tensor, device: torch.device | None) -> None:
        """Start to copy `weight` to `device`, unless that is under way or enough is; returns at once.

        Weights are taken in the order in which they were prepared, and those that were left out may be tried again.
        """
        if device is None or not is_streamed(weight, device) or any(w is weight for w, _ in self._pending):
            return
        ahead = sum(other.nbytes for other, _ in self._pending)
        if self._pending and ahead + weight.nbytes > _AHEAD_BYTES:
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="hqq-weights")
        self._pending.append((weight, self._thread.submit(self._copy, weight.detach(), device)))

    def take(self, weight: Tensor) -> Tensor:
        """Return the copy of `weight`, if it was prepared, else `weight` itself.

        The caller's current stream waits for the copy, the caller does not. Where a device has no room for two weights
        at once there is no copy either.
        """
        if not self._pending or self._pending[0][0] is not weight:
            return weight
        _, future = self._pending.popleft()
        try:
            copy = future.result()
        except torch.cuda.OutOfMemoryError:
            return weight
        stream = torch.cuda.current_stream(copy.tensor.device)
        stream.wait_event(copy.done)
        copy.tensor.record_stream(stream)
        return copy.tensor

    def _drop(self) -> None:
        while self._pending:
            self._pending.pop()[1].cancel()

    def _copy(self, weight: Tensor, device: torch.device) -> _Copy:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        with torch.no_grad(), torch.cuda.stream(stream):
            target = torch.empty(weight.shape, dtype=weight.dtype, device=device)
            if weight.is_pinned() or not weight.is_contiguous():
                target.copy_(weight, non_blocking=True)
            else:
                self._copy_in_stages(weight.view(-1), target.view(-1), stream)
            return _Copy(target, stream.record_event())

    def _copy_in_stages(self, source: Tensor, target: Tensor, stream: torch.cuda.Stream) -> None:
        if not self._stages:
            buffers = [torch.empty(_STAGED_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(_STAGES)]
            self._stages = [(buffer, None) for buffer in buffers]
        count = _STAGED_BYTES // source.element_size()
        for i, begin in enumerate(range(0, source.numel(), count)):
            part = source[begin : begin + count]
            buffer, read = self._stages[i % _STAGES]
            if read is not None:
                read.synchronize()
            staged = buffer.view(source.dtype)[: part.numel()].copy_(part)
            target[begin : begin + count].copy_(staged, non_blocking=True)
            self._stages[i % _STAGES] = (buffer, stream.record_event())
