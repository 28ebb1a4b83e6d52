"""A checkpoint under the names of the model: transformers saves some models under the names of older versions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from hqq.models.checkpoint.safetensors_source import SafetensorsSource
from hqq.models.checkpoint.source import LayerState
from hqq.models.checkpoint.torch_file import TorchSource

FileSource = SafetensorsSource | TorchSource
Renaming = Callable[[str], str]


class RenamedSource:
    """`source` with other names for some of its units; `new_names` has those that change."""

    def __init__(self, source: FileSource, new_names: Mapping[str, str]) -> None:
        def new(name: str) -> str:
            return new_names.get(name, name)

        self._source = source
        self._old = {new(name): name for name in source.units}
        self.units = {new(name): size for name, size in source.units.items()}
        self.layers = frozenset(new(name) for name in source.layers)
        self.shared = {new(alias): new(name) for alias, name in source.shared.items()}
        self.shapes = {new(name): shape for name, shape in source.shapes.items()}

    def layer(self, name: str) -> LayerState:
        return self._source.layer(self._old[name])

    def layer_outline(self, name: str) -> LayerState:
        """Return a layer's state without its large tensors."""
        return self._source.layer_outline(self._old[name])

    def tensor(self, name: str) -> Tensor:
        return self._source.tensor(self._old[name])


def under_names_of(model: nn.Module, source: FileSource) -> FileSource | RenamedSource:
    """Return `source` with the names that `model` has today, as far as transformers knows what they were before.

    Names that the model has, or that no renaming leads to one, stay.
    """
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    known |= {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    strangers = [name for name in {*source.units, *source.shared} if name not in known]
    if not strangers:
        return source
    rename = _renaming(model)
    new_names: dict[str, str] = {}
    for name in sorted(strangers):
        # Renamings are written for tensors, and may look at the end of a name.
        found = [rename(name), rename(f"{name}.weight").removesuffix(".weight")]
        new = next((candidate for candidate in found if candidate in known), None)
        if new is not None:
            new_names[name] = new
    taken = {*source.units, *source.shared} - new_names.keys()
    if not new_names or taken & set(new_names.values()) or len(set(new_names.values())) < len(new_names):
        return source
    return RenamedSource(source, new_names)


def _renaming(model: Any) -> Renaming:
    """Return the function from a name in a checkpoint to the model's, as transformers renames when it loads."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        return lambda name: name
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # before transformers 5
        return _by_patterns(getattr(model, "_checkpoint_conversion_mapping", None) or {})
    steps: list[Any] = get_model_conversion_mapping(model)
    renamings = [step for step in steps if not isinstance(step, WeightConverter)]

    def rename(name: str) -> str:
        for step in renamings:
            name = step.rename_source_key(name)[0]
        return name

    return rename


def _by_patterns(patterns: Mapping[str, str]) -> Renaming:
    def rename(name: str) -> str:
        for pattern, replacement in patterns.items():
            renamed, count = re.subn(pattern, replacement, name)
            if count:
                return renamed
        return name

    return rename
