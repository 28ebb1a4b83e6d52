"""`layer.meta`: the layer's description as the dict that old callers read and write."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hqq.core.quantized_module import QuantizedModule


class MetaView(MutableMapping[str, Any]):
    """Reads and writes go through to the layer. Keys that the layer has no use for are kept as they are.

    Once the layer's meta has been set to None, the view is a plain dict of what it showed last, so that callers who
    kept it can put it back.
    """

    def __init__(self, layer: QuantizedModule) -> None:
        self._layer: QuantizedModule | None = layer
        self._kept: dict[str, Any] = {}

    def detach(self) -> None:
        """Keep what the view shows now, and let go of the layer."""
        self._kept, self._layer = self.copy(), None

    def copy(self) -> dict[str, Any]:
        """Return the description as a plain dict."""
        return dict(self._kept) if self._layer is None else self._layer._meta_dict()

    def __getitem__(self, key: str) -> Any:
        return self.copy()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if self._layer is None:
            self._kept[key] = value
        elif key == "compute_dtype":
            self._layer.compute_dtype = value
        else:
            self._layer.meta = {**self.copy(), key: value}

    def __delitem__(self, key: str) -> None:
        if self._layer is None:
            del self._kept[key]
        else:
            self._layer._delete_meta(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.copy())

    def __len__(self) -> int:
        return len(self.copy())

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled or deep-copied view is a plain dict: it has no layer to write through to.
        return dict, (self.copy(),)

    def __repr__(self) -> str:
        return f"MetaView({self.copy()!r})"
