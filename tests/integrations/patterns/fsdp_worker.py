"""One rank of a run as fsdp_qlora does it: quantised under FSDP, an adapter trained. Prints its losses as JSON.

python fsdp_worker.py RANK RANKS STORE
"""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

SIZE, STEPS, BLOCKS = 64, 3, 2


class Lora(nn.Module):
    """An adapter around a frozen layer."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(SIZE, 4, bias=False, dtype=torch.bfloat16)
        self.lora_B = nn.Linear(4, SIZE, bias=False, dtype=torch.bfloat16)
        nn.init.normal_(self.lora_B.weight, std=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.base_layer(x) + self.lora_B(self.lora_A(x))


def skeleton() -> HQQLinear:
    """An HQQLinear around a layer without data, as replace_linear makes it on the meta device."""
    config = BaseQuantizeConfig(
        nbits=4, group_size=64, quant_zero=True, quant_scale=True, offload_meta=True, view_as_float=True
    )
    with torch.device("meta"):
        linear = nn.Linear(SIZE, SIZE)
    options: dict[str, Any] = {"compute_dtype": torch.bfloat16, "device": "cpu", "del_orig": True}
    return HQQLinear(linear, config, initialize=False, **options)


def build() -> nn.Module:
    torch.manual_seed(0)
    blocks = []
    for _ in range(BLOCKS):
        layer = skeleton()
        assert layer.linear_layer is not None
        layer.linear_layer.to_empty(device="cpu")
        layer.linear_layer.weight.data.copy_(torch.randn(SIZE, SIZE) / 8)  # type: ignore[operator, union-attr]
        layer.linear_layer.bias.data.copy_(torch.randn(SIZE))  # type: ignore[operator, union-attr]
        layer.initialize()
        layer.W_q = nn.Parameter(layer.W_q.to("cpu"), requires_grad=False)  # type: ignore[union-attr]
        layer.in_gpu = False
        blocks.append(Lora(layer))
    model = nn.Sequential(*blocks)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def shard(model: nn.Module) -> nn.Module:
    def own_unit(module: nn.Module) -> bool:
        # Blocks, and what is trained: a flat parameter has one requires_grad.
        return isinstance(module, Lora) or (isinstance(module, nn.Linear) and module.weight.requires_grad)

    policy = functools.partial(lambda_auto_wrap_policy, lambda_fn=own_unit)
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=False, device_id=torch.device("cpu")
    )


def train(model: nn.Module) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    x = torch.linspace(-1, 1, 2 * SIZE, dtype=torch.bfloat16).view(2, SIZE)
    losses = []
    for _ in range(STEPS):
        loss = model(x).float().pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    HQQLinear.set_backend(HQQBackend.ATEN_BACKPROP)
    rank, ranks, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    if ranks == 1:
        print(json.dumps(train(build())))  # noqa: T201
        sys.exit()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    print(json.dumps(train(shard(build()))))  # noqa: T201
    dist.destroy_process_group()
