"""A quantised model as the source of a checkpoint."""

from __future__ import annotations

from torch import Tensor, nn

from hqq.core.layer_state import layer_state
from hqq.core.modules import named_sites
from hqq.core.quantized_module import QuantizedModule
from hqq.errors import CheckpointError, NotQuantizedError
from hqq.models.checkpoint.source import LayerState, state_bytes
from hqq.models.sharing import share_weight


class ModelSource:
    """The layers and tensors of `model`, shared ones under their first name.

    Raises NotQuantizedError for a model without quantised layers, CheckpointError for what cannot be saved.
    """

    def __init__(self, model: nn.Module) -> None:
        self.units: dict[str, int] = {}
        self.shared: dict[str, str] = {}
        self._layers: dict[str, QuantizedModule] = {}
        self._tensors: dict[str, Tensor] = {}
        inside = self._collect_layers(model)
        self._collect_tensors(model, inside)
        self.layers = frozenset(self._layers)

    def layer(self, name: str) -> LayerState:
        return layer_state(self._layers[name], encoded=False)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def _collect_layers(self, model: nn.Module) -> list[str]:
        """Note the quantised layers; return the prefixes of their keys in the model's state dict."""
        prefixes = []
        for module, names in named_sites(model).items():
            if not isinstance(module, QuantizedModule):
                continue
            prefixes += [f"{name}." for name in names]
            name = names[0]
            if not module.is_initialized():
                raise NotQuantizedError(
                    f"{name}: got a layer without a quantised weight; call initialize() or load it"
                )
            source = next(
                (known for known, layer in self._layers.items() if share_weight(layer, module)), None
            )
            if source is None:
                self._layers[name] = module
            else:
                self.shared[name] = source
                if module.bias is not None:
                    self._tensors[f"{name}.bias"] = module.bias
            self.shared.update(dict.fromkeys(names[1:], source or name))
        if not self._layers:
            raise NotQuantizedError(
                f"got a {type(model).__name__} without quantised layers; call quantize_model(model, config) first"
            )
        return prefixes

    def _collect_tensors(self, model: nn.Module, inside: list[str]) -> None:
        """Note everything else, and the order and size of all units."""
        first_name: dict[tuple[int, object, object, object], str] = {}
        state = model.state_dict(keep_vars=True)
        for key, value in state.items():
            layer = key.rpartition(".")[0]
            if layer in self._layers:
                self.units.setdefault(layer, 0)
                continue
            if key in self._tensors:
                self.units[key] = self._tensors[key].nbytes
                continue
            if any(key.startswith(prefix) for prefix in inside):
                continue
            if not isinstance(value, Tensor) or value.is_meta:
                kind = (
                    "a tensor without data (meta device)"
                    if isinstance(value, Tensor)
                    else type(value).__name__
                )
                raise CheckpointError(
                    f"got {kind} as {key}; expected a tensor. Load the model's weights before saving"
                )
            identity = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
            known = first_name.setdefault(identity, key) if value.numel() else key
            if known != key:
                self.shared[key] = known
                continue
            self._tensors[key] = value.detach()
            self.units[key] = value.nbytes
        for name in self._layers:
            self.units[name] = state_bytes(self.layer(name))
