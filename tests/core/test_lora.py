"""The library's own adapters as layers: what they compute, their gradients, their memory, and merging them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from hqq.core.adapter import LinearAdapter
from hqq.core.peft import ADAPTERS, HQQLinearGroupedProj, HQQLinearLoRA, HQQLinearLoRAWithFakeQuant
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from hqq.errors import ConfigError, MissingKeysError, ShapeError

K, N, M, R = 48, 32, 5, 4
FAKE = {"nbits": 3, "group_size": 16, "axis": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"r": R, "lora_alpha": 6},
    "lora_with_fakequant": {"r": R, "lora_alpha": 6, "quant_param": FAKE},
    "grouped_proj": {"proj_size": 8, "proj_num": N // 8},
}
LOW_RANK = ("default", "lora_with_fakequant")
BASES = ("hqq", "linear")


def linear(rng: torch.Generator, dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(K, N, bias=bias, dtype=dtype)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng).to(dtype)
    return layer


def base_layer(
    kind: str, rng: torch.Generator, dtype: torch.dtype = torch.float64, bias: bool = True, **config: Any
) -> nn.Module:
    layer = linear(rng, dtype, bias)
    if kind == "linear":
        return layer
    return HQQLinear(
        layer, BaseQuantizeConfig(**{"nbits": 4, "group_size": 16, **config}), compute_dtype=dtype
    )


def weight_of(layer: nn.Module) -> Tensor:
    return (layer.dequantize() if isinstance(layer, HQQLinear) else layer.weight).detach().clone()


def adapter_around(
    layer: nn.Module,
    lora_type: str,
    rng: torch.Generator,
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> LinearAdapter:
    """An adapter whose trained values are random, so that every gradient counts."""
    config = {"lora_type": lora_type, "train_dtype": dtype, **SETTINGS[lora_type], **settings}
    adapter = ADAPTERS[lora_type](layer, config)
    for name, parameter in adapter.named_parameters(recurse=False):
        if name != "zero" and parameter.requires_grad:
            parameter.data = (torch.randn(parameter.shape, generator=rng) / 4).to(parameter.dtype)
    return adapter


def straight_through(W: Tensor) -> Tensor:
    """Quantised value, gradient of the identity, written without the library's autograd function."""
    W_q, meta = Quantizer.quantize(W.detach(), **FAKE)
    rounded = Quantizer.dequantize(W_q, {**meta, "compute_dtype": W.dtype})
    return W + (rounded - W).detach()


def blockwise(proj: Tensor, W: Tensor) -> Tensor:
    return torch.block_diag(*proj.unbind()) @ W


def reference(lora_type: str, W: Tensor, p: dict[str, Tensor], x: Tensor) -> Tensor:
    """The same layer on a plain weight: one product with one dense matrix."""
    if lora_type == "grouped_proj":
        effective = blockwise(p["proj"], W)
    else:
        effective = W + 6 / R * (p["lora_A"] @ p["lora_B"]).T
        effective = straight_through(effective) if lora_type == "lora_with_fakequant" else effective
    return x @ effective.T + p["bias"]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", [8, 3, 1])
@pytest.mark.parametrize("lora_type", ADAPTERS)
def test_outputs_and_gradients_are_those_of_the_dense_layer(
    lora_type: str, nbits: int, axis: int, rng: torch.Generator
) -> None:
    layer = base_layer("hqq", rng, nbits=nbits, axis=axis)
    check_against_dense(layer, lora_type, rng)


@pytest.mark.parametrize("lora_type", ADAPTERS)
def test_plain_linear_layers_are_adapted_alike(lora_type: str, rng: torch.Generator) -> None:
    check_against_dense(base_layer("linear", rng), lora_type, rng)


def check_against_dense(layer: nn.Module, lora_type: str, rng: torch.Generator) -> None:
    W = weight_of(layer)
    adapter = adapter_around(layer, lora_type, rng, train_bias=True)
    own = {name: p.detach().clone().requires_grad_() for name, p in adapter.named_parameters(recurse=False)}
    x = torch.randn(2, M, K, generator=rng, dtype=torch.float64)
    g = torch.randn(2, M, N, generator=rng, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = adapter(ours), reference(lora_type, W, own, theirs)
    y.backward(g)
    expected.backward(g)
    # float64 against float64: sums of at most N * K terms of size below 100.
    bound = {"rtol": 0, "atol": 100 * N * K * torch.finfo(torch.float64).eps}
    torch.testing.assert_close(y, expected, **bound)
    torch.testing.assert_close(ours.grad, theirs.grad, **bound)
    for name, parameter in adapter.named_parameters(recurse=False):
        torch.testing.assert_close(parameter.grad, own[name].grad, **bound)
    assert all(p.grad is None for p in adapter.linear_layer.parameters())


@pytest.mark.parametrize("config", [{}, {"quant_zero": True}], ids=["float zeros", "quantised zeros"])
def test_zeros_are_trained_on_request(config: dict[str, Any], rng: torch.Generator) -> None:
    layer = base_layer("hqq", rng, nbits=2, **config)
    q = layer.qtensor()
    scale, zero = layer._scale_and_zero()
    adapter = adapter_around(layer, "grouped_proj", rng, zero_trainable=True)
    torch.testing.assert_close(adapter.effective_weight(), blockwise(adapter.proj, weight_of(layer)))
    trained = zero.clone().requires_grad_()
    x = torch.randn(M, K, generator=rng, dtype=torch.float64)
    W = ((q.codes(torch.float64) - trained) * scale).reshape(N, K)
    (x @ blockwise(adapter.proj.detach(), W).T + adapter.bias).square().sum().backward()
    adapter(x).square().sum().backward()
    torch.testing.assert_close(adapter.zero.grad, trained.grad)
    assert trained.grad.abs().min() > 0


def test_grouped_projection_starts_as_the_layer_itself(rng: torch.Generator) -> None:
    layer = base_layer("hqq", rng)
    x = torch.randn(M, K, generator=rng, dtype=torch.float64)
    before = layer(x)
    adapter = HQQLinearGroupedProj(layer, {**SETTINGS["grouped_proj"], "train_dtype": torch.float64})
    torch.testing.assert_close(adapter(x), before)


@pytest.mark.parametrize("kind", BASES)
def test_low_rank_adapter_starts_as_the_layer_itself(kind: str, rng: torch.Generator) -> None:
    layer = base_layer(kind, rng, torch.bfloat16)
    x = torch.randn(M, K, generator=rng).bfloat16()
    before = layer(x)
    bias = layer.bias.detach().clone()
    adapter = HQQLinearLoRA(layer, SETTINGS["default"])
    assert torch.equal(adapter.bias, bias)
    assert adapter.lora_A.dtype is torch.float32
    assert adapter(x).dtype is torch.bfloat16
    # The layer's output without bias and the bias are rounded to bfloat16 one after the other.
    torch.testing.assert_close(adapter(x), before, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=0.25)
    assert 0.5 / R**0.5 < adapter.lora_A.abs().max() <= 1 / R**0.5


@pytest.mark.parametrize("lora_type", LOW_RANK)
def test_dropout_acts_on_the_adapter_only_and_backward_repeats_it(
    lora_type: str, rng: torch.Generator
) -> None:
    layer = base_layer("hqq", rng)
    W = weight_of(layer)
    adapter = adapter_around(layer, lora_type, rng, dropout=0.5, quant_param=None).train()
    A, B = (p.detach().clone().requires_grad_() for p in (adapter.lora_A, adapter.lora_B))
    x = torch.randn(M, K, generator=rng, dtype=torch.float64)
    torch.manual_seed(3)
    adapter(x).square().sum().backward()
    torch.manual_seed(3)
    kept = nn.functional.dropout(torch.ones_like(x) if lora_type == "default" else x.new_ones(K, 1))
    added = (x * kept if lora_type == "default" else x * kept.T) @ A @ B * 6 / R
    (x @ W.T + added + adapter.bias).square().sum().backward()
    torch.testing.assert_close(adapter.lora_A.grad, A.grad)
    torch.testing.assert_close(adapter.lora_B.grad, B.grad)
    adapter.eval()
    torch.testing.assert_close(adapter(x), x @ adapter.effective_weight().T + adapter.bias)


class LargeTensors(TorchDispatchMode):
    """Remembers the storage of every float tensor of at least `least` numbers that an operation returns."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.seen = least, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel() >= self.least:
                self.seen.append(StorageWeakRef(tensor.untyped_storage()))
        return out

    def alive(self) -> int:
        return len({ref.cdata for ref in self.seen if not ref.expired()})


@pytest.mark.parametrize("lora_type", ADAPTERS)
def test_no_dequantised_weight_lives_from_forward_to_backward(lora_type: str, rng: torch.Generator) -> None:
    adapter = adapter_around(base_layer("hqq", rng), lora_type, rng, proj_size=4, proj_num=N // 4)
    x = torch.randn(M, K, generator=rng, dtype=torch.float64, requires_grad=True)
    with LargeTensors(N * K) as large:
        y = adapter(x)
    assert large.seen, "the weight was never built: the test looks for the wrong size"
    assert large.alive() == 0
    y.sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("lora_type", ADAPTERS)
def test_training_changes_the_adapter_and_not_the_codes(lora_type: str, rng: torch.Generator) -> None:
    original = linear(rng, torch.float32)
    W, bias = original.weight.detach().clone(), original.bias.detach().clone()
    layer = HQQLinear(original, BaseQuantizeConfig(nbits=2, group_size=16), compute_dtype=torch.float32)
    state = {key: value.clone() for key, value in layer.state_dict().items() if key != "bias"}
    adapter = ADAPTERS[lora_type](layer, {**SETTINGS[lora_type], "quant_param": None})
    optimizer = torch.optim.Adam([p for p in adapter.parameters() if p.requires_grad], lr=0.02)
    x = torch.randn(256, K, generator=rng)
    losses = []
    for _ in range(40):
        loss = nn.functional.mse_loss(adapter(x), x @ W.T + bias)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # 0.66 and, with the grouped projection, 0.80 of it on average; a standard deviation is 0.016 (150 seeds).
    assert losses[-1] < 0.95 * losses[0]
    after = layer.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in state.items())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("lora_type", ADAPTERS)
def test_merged_linear_computes_the_same(lora_type: str, kind: str, bias: bool, rng: torch.Generator) -> None:
    adapter = adapter_around(base_layer(kind, rng, bias=bias), lora_type, rng, dropout=0.3).eval()
    x = torch.randn(M, K, generator=rng, dtype=torch.float64)
    merged = adapter.merge_and_quantize(None)
    assert type(merged) is nn.Linear
    assert merged.weight.dtype is torch.float64
    assert (merged.bias is not None) is bias
    torch.testing.assert_close(merged(x), adapter(x))


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("lora_type", ADAPTERS)
def test_merge_and_quantize_quantises_the_merged_weight(
    lora_type: str, kind: str, rng: torch.Generator
) -> None:
    adapter = adapter_around(base_layer(kind, rng, torch.float32), lora_type, rng, torch.float32)
    config = BaseQuantizeConfig(nbits=4, group_size=8)
    merged = adapter.merge_and_quantize(config)
    W = adapter.effective_weight().detach()
    W_q, meta = Quantizer.quantize(W, **config["weight_quant_params"], compute_dtype=torch.float32)
    assert type(merged) is HQQLinear
    assert torch.equal(merged.W_q, W_q)
    assert torch.equal(merged.meta["scale"], meta["scale"])
    assert torch.equal(merged.bias, adapter.bias)
    assert merged.quant_config["weight_quant_params"]["group_size"] == 8


@pytest.mark.parametrize("lora_type", ADAPTERS)
def test_state_dict_copies_and_casts_follow_the_module_protocol(lora_type: str, rng: torch.Generator) -> None:
    adapter = adapter_around(base_layer("hqq", rng, torch.float32), lora_type, rng, torch.float32).eval()
    x = torch.randn(M, K, generator=rng)
    y = adapter(x)
    other = adapter_around(base_layer("hqq", rng, torch.float32), lora_type, rng, torch.float32).eval()
    assert not torch.equal(other(x), y)
    other.load_state_dict(adapter.state_dict())
    for twin in (other, copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        assert torch.equal(twin(x), y)
    before = {name: p.detach().clone() for name, p in adapter.named_parameters(recurse=False)}
    adapter.to(torch.bfloat16)
    assert adapter.compute_dtype is torch.bfloat16
    for name, parameter in adapter.named_parameters(recurse=False):
        assert torch.equal(parameter, before[name].bfloat16())
    x = x.bfloat16()
    exact = x.double() @ adapter.effective_weight().double().T + adapter.bias.double()
    # At most eight roundings to bfloat16 from parameters to output, and as many to a weight built from them: products,
    # scaling, sums and the results of them. Each is relative to what adds up in it.
    allowed = 8 * torch.finfo(torch.bfloat16).eps / 2 * reach(adapter, x)
    assert bool(((adapter(x).double() - exact).abs() <= allowed).all())


def reach(adapter: LinearAdapter, x: Tensor) -> Tensor:
    """What the output for `x` would be if nothing in it cancelled: sums of magnitudes, through adapter and weight."""
    p = {name: value.detach().double().abs() for name, value in adapter.named_parameters(recurse=False)}
    W = adapter.base_weight().double().abs()
    parts = blockwise(p["proj"], W) if "proj" in p else W + adapter.scaling * (p["lora_A"] @ p["lora_B"]).T
    return x.double().abs() @ (parts + adapter.effective_weight().double().abs()).T + p["bias"]


def test_cast_leaves_the_layer_alone(rng: torch.Generator) -> None:
    adapter = adapter_around(base_layer("hqq", rng, torch.float32), "default", rng, torch.float32)
    assert adapter.cast(torch.float16) is adapter
    assert {p.dtype for p in adapter.parameters(recurse=False)} == {torch.float16}
    assert adapter.linear_layer.compute_dtype is torch.float32
    assert adapter(torch.randn(M, K, generator=rng)).dtype is torch.float32


def test_given_start_values_are_used(rng: torch.Generator) -> None:
    init = {"lora_A": torch.randn(K, R, generator=rng), "lora_B": torch.randn(R, N, generator=rng)}
    adapter = HQQLinearLoRA(base_layer("linear", rng), {**SETTINGS["default"], "lora_init": init})
    assert torch.equal(adapter.lora_A, init["lora_A"])
    assert torch.equal(adapter.lora_B, init["lora_B"])


def test_fake_quantisation_takes_a_nested_config(rng: torch.Generator) -> None:
    layer = base_layer("linear", rng)
    nested = BaseQuantizeConfig(nbits=2, group_size=16, axis=0)
    adapter = HQQLinearLoRAWithFakeQuant(layer, {"r": R, "lora_alpha": 1, "quant_param": nested})
    levels = adapter.effective_weight().reshape(16, -1)
    assert all(column.unique().numel() <= 4 for column in levels.T)


BAD_SETTINGS = [
    ("default", {"lora_alpha": 1}, "missing \\['r'\\]"),
    ("default", {"r": 4, "lora_alpha": 1, "drop_out": 0.1}, "unknown \\['drop_out'\\]"),
    ("default", {"r": 0, "lora_alpha": 1}, "got r=0"),
    ("default", {"r": 4, "lora_alpha": 1, "dropout": 1.0}, "got dropout=1.0"),
    ("grouped_proj", {"proj_size": 7, "proj_num": 4}, "use a proj_size that divides 32"),
    ("grouped_proj", {"proj_size": 8, "proj_num": 4, "zero_trainable": True}, "has no zeros"),
]


@pytest.mark.parametrize(("lora_type", "settings", "message"), BAD_SETTINGS)
def test_unusable_settings_raise_and_leave_the_layer_as_it_was(
    lora_type: str, settings: dict[str, Any], message: str, rng: torch.Generator
) -> None:
    layer = base_layer("linear", rng)
    with pytest.raises(ConfigError, match=message):
        ADAPTERS[lora_type](layer, settings)
    assert layer.bias is not None
    assert layer.weight.requires_grad


def test_start_values_of_a_wrong_shape_raise(rng: torch.Generator) -> None:
    init = {"lora_A": torch.zeros(R, K), "lora_B": torch.zeros(R, N)}
    with pytest.raises(ShapeError, match=r"expected \(48, 4\)"):
        HQQLinearLoRA(base_layer("linear", rng), {**SETTINGS["default"], "lora_init": init})


def test_states_that_do_not_fit_raise_and_change_nothing(rng: torch.Generator) -> None:
    adapter = adapter_around(base_layer("linear", rng, bias=False), "default", rng)
    before = adapter.adapter_state()
    with pytest.raises(ShapeError, match="lora_B"):
        adapter.load_adapter_state(
            {**before, "lora_A": before["lora_A"] + 1, "lora_B": torch.zeros(R + 1, N)}
        )
    with pytest.raises(MissingKeysError, match="missing \\['lora_A'\\]"):
        adapter.load_adapter_state({"lora_B": before["lora_B"]})
    with pytest.raises(MissingKeysError, match="bias=True"):
        adapter.load_adapter_state({**before, "bias": torch.zeros(N)})
    with pytest.raises(ShapeError, match="scaling"):
        adapter.load_adapter_state({**before, "scaling": torch.ones(3)})
    assert torch.equal(adapter.lora_A, before["lora_A"])
