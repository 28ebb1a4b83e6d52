"""`layer.meta`: the layer's description as the dict that old callers read and write."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hqq.core.linear import HQQLinear


class MetaView(MutableMapping[str, Any]):
    """Reads and writes go through to the layer. Keys that the layer has no use for are kept as they are."""

    def __init__(self, layer: HQQLinear) -> None:
        self._layer = layer

    def __getitem__(self, key: str) -> Any:
        return self._layer._meta_dict()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "compute_dtype":
            self._layer.compute_dtype = value
            return
        self._layer.meta = {**self._layer._meta_dict(), key: value}

    def __delitem__(self, key: str) -> None:
        self._layer._delete_meta(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layer._meta_dict())

    def __len__(self) -> int:
        return len(self._layer._meta_dict())

    def copy(self) -> dict[str, Any]:
        """Return the description as a plain dict."""
        return self._layer._meta_dict()

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled or deep-copied view is a plain dict: it has no layer to write through to.
        return dict, (self._layer._meta_dict(),)

    def __repr__(self) -> str:
        return f"MetaView({self._layer._meta_dict()!r})"
