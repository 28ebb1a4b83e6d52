"""Opening a model or a quantised checkpoint, by folder or hub id, with its tokenizer."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from hqq.core.devices import DeviceLike, resolve_device
from hqq.errors import CheckpointError, CorruptCheckpointError, HQQError, MissingKeysError
from hqq.models.checkpoint import is_hqq_checkpoint, load_quantized
from hqq.models.checkpoint.config_file import TOKENIZER_FILES
from hqq.models.checkpoint.layout import CONFIG, locate, read_json
from hqq.models.checkpoint.skeleton import architectures_of
from hqq.models.text import Tokenizer


def open_model(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: DeviceLike = None,
    progress: bool = True,
) -> nn.Module:
    """Return the model of a folder or hub id, quantised or not, ready for inference.

    dtype is what it computes in (None: its own), device where it runs (None: a GPU if there is one).
    Raises CheckpointError for what is not there, incomplete or damaged.
    """
    folder, target = locate(source), resolve_device(device)
    if is_hqq_checkpoint(folder):
        return load_quantized(folder, device=target, compute_dtype=dtype).eval()
    return open_full(folder, dtype=dtype, progress=progress).to(target)


def open_full(source: str | Path, *, dtype: torch.dtype | None = None, progress: bool = True) -> nn.Module:
    """Return the unquantised model of a folder or hub id, on the CPU; raises CheckpointError as `open_model` does."""
    folder = locate(source)
    if is_hqq_checkpoint(folder):
        raise CheckpointError(f"got {str(source)!r}, which is quantised already; expected the original model")
    transformers = _transformers()
    named = [name for name in architectures_of(read_json(folder / CONFIG)) if hasattr(transformers, name)]
    model_class = getattr(transformers, named[0] if named else "AutoModelForCausalLM")
    with _explained(source), _bars(transformers, progress):
        model, report = model_class.from_pretrained(
            folder, output_loading_info=True, **{_dtype_argument(transformers): dtype or "auto"}
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise MissingKeysError(
            f"got {str(source)!r} without {len(missing)} of the weights of {model_class.__name__} "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); expected a complete model"
        )
    full: nn.Module = model.eval()
    return full


def open_tokenizer(source: str | Path) -> Tokenizer:
    """Return the tokenizer of a folder or hub id; raises CheckpointError if there is none that transformers reads."""
    folder = locate(source)
    read_json(folder / CONFIG)  # a folder that is no model's at all says so first
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"got {str(source)!r}, which holds no tokenizer; copy the original model's files there"
        )
    with _explained(source, "the tokenizer of "):
        tokenizer: Tokenizer = _transformers().AutoTokenizer.from_pretrained(folder)
    return tokenizer


@contextmanager
def _explained(source: str | Path, what: str = "") -> Iterator[None]:
    """Turn what transformers raises for a model that it cannot load into CheckpointError."""
    try:
        yield
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise CorruptCheckpointError(
            f"got {what}{str(source)!r}, whose weights are damaged ({_first_line(error)}); copy or download it again"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"got {what}{str(source)!r}, which transformers cannot load: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(". :")


@contextmanager
def _bars(transformers: Any, progress: bool) -> Iterator[None]:
    """Let transformers draw its progress bars on a terminal only, as this library does."""
    logging = transformers.utils.logging
    silent = logging.is_progress_bar_enabled() and not (progress and sys.stderr.isatty())
    if silent:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if silent:
            logging.enable_progress_bar()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise HQQError("this needs transformers, which is not installed: pip install 'hqq[hf]'") from None
    return transformers


def _dtype_argument(transformers: Any) -> str:
    """Return what `from_pretrained` calls its dtype: it was `torch_dtype` before 4.56."""
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"
