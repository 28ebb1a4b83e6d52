"""Memory while quantising: never more than the model and one layer."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn

import hqq.models.install as install_module
from hqq import QuantConfig, quantize_model


@pytest.mark.parametrize("errors", [False, True])
def test_each_weight_is_freed_as_soon_as_its_codes_exist(
    monkeypatch: pytest.MonkeyPatch, errors: bool
) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    weights = [weakref.ref(layer.weight.untyped_storage()) for layer in model]
    alive: list[int] = []
    replace = install_module.replace_module

    def watch(*args: Any) -> None:
        alive.append(sum(storage() is not None for storage in weights))
        replace(*args)

    monkeypatch.setattr(install_module, "replace_module", watch)
    quantize_model(model, QuantConfig(nbits=4, group_size=64), errors=errors)
    # When layer i is put in place, the weights before it are gone; its own may be alive, for its error.
    assert alive == [6 - i - (0 if errors else 1) for i in range(6)]
    assert all(storage() is None for storage in weights)


def test_embeddings_are_freed_too() -> None:
    model = nn.ModuleList([nn.Embedding(64, 64), nn.Linear(64, 64)])
    table = weakref.ref(model[0].weight)
    quantize_model(model, QuantConfig(nbits=4), embeddings=True)
    assert table() is None
    assert isinstance(model[1].W_q, torch.Tensor)
