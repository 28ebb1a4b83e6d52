"""Everything that hqq raises on purpose.

Argument errors are ValueError or TypeError as well, so code that catches the built-in classes keeps working.
Messages state what was got, what is expected, and what to do.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "CheckpointError",
    "CheckpointExistsError",
    "ConfigError",
    "CorruptCheckpointError",
    "DeviceFallbackWarning",
    "DtypeError",
    "HQQError",
    "IdRangeError",
    "KernelError",
    "MissingKeysError",
    "NotQuantizedError",
    "QuantizationWarning",
    "ShapeError",
    "WeightError",
]


class HQQError(Exception):
    """Base class of every error raised by hqq."""


class ConfigError(HQQError, ValueError):
    """A quantisation setting is invalid, or does not fit the tensor it is applied to."""


class WeightError(HQQError, ValueError):
    """A weight cannot be quantised: empty, not finite, or out of the range of the storage dtype."""


class ShapeError(HQQError, ValueError):
    """A tensor has another shape than its description says."""


class DtypeError(HQQError, TypeError):
    """A tensor has a dtype that the operation does not take."""


class IdRangeError(HQQError, IndexError):
    """An embedding was asked for a row that it does not have."""


class NotQuantizedError(HQQError, RuntimeError):
    """A layer was used before it was quantised or loaded."""


class BackendError(HQQError, RuntimeError):
    """A backend was asked for that is unknown, unavailable, or does not support the layer."""


class KernelError(HQQError, RuntimeError):
    """A kernel cannot be compiled, loaded or launched on this machine."""


class CheckpointError(HQQError):
    """A checkpoint cannot be read or written."""


class MissingKeysError(CheckpointError, KeyError):
    """A state dict or checkpoint lacks keys, or has keys that nothing takes."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""  # KeyError would show the repr of the message


class CorruptCheckpointError(CheckpointError, ValueError):
    """A checkpoint's content is truncated or contradicts itself."""


class CheckpointExistsError(CheckpointError, FileExistsError):
    """The path to write to exists and may not be replaced."""


class DeviceFallbackWarning(UserWarning):
    """The device asked for does not exist on this machine, and another one is used."""


class QuantizationWarning(UserWarning):
    """A tensor was quantised, but the storage dtype costs precision that the bits would allow."""
