"""A layer with a prepared weight is the layer it was: same state to the bit, same protocol, same gradient."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hqq.backends.prepare import prepare_for_inference, restore
from hqq.core.embedding import HQQEmbedding
from hqq.core.linear import HQQLinear
from hqq.core.lora import HQQLinearLoRA
from hqq.errors import BackendError, DtypeError, ShapeError
from tests.backends.kinds import KINDS, K, Kind, N, kind_id, layer_of, native_on_cpu
from tests.core.layers import config, same_state, same_value
from tests.kernels.quantized import ALLOW_SCRIPT_METHOD

# What the project promises of products in bfloat16, against a product in float64 with the weight in float64.
BOUND = 1e-2


@pytest.fixture(params=KINDS, ids=kind_id)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kind:
    native_on_cpu(monkeypatch)
    chosen: Kind = request.param
    return chosen


@pytest.fixture
def layer(kind: Kind, rng: torch.Generator) -> HQQLinear:
    return layer_of(kind, rng)


def inputs(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, K, generator=rng).bfloat16()


def snapshot(layer: HQQLinear) -> dict[str, Any]:
    return copy.deepcopy(dict(layer.state_dict()))


def exact(layer: HQQLinear, x: Tensor) -> Tensor:
    q = layer.qtensor()
    scale, zero = layer._scale_and_zero()
    W = q.spec.grouping.ungroup((q.codes(torch.float64) - zero.double()) * scale.double())
    return F.linear(x.double(), W, None if layer.bias is None else layer.bias.double())


def test_everything_that_is_read_is_what_it_was(kind: Kind, layer: HQQLinear, rng: torch.Generator) -> None:
    before, meta = snapshot(layer), copy.deepcopy(layer.meta.copy())
    W_q, scale, zero = (copy.deepcopy(getattr(layer, name)) for name in ("W_q", "scale", "zero"))
    weight, codes, device = layer.dequantize(), layer.unpack(reshape=True), layer.device
    got = layer.prepare(kind[0])
    assert (got.got, got.reason) == (kind[0], None)
    assert layer.prepared is not None and layer.prepared.backend == kind[0]
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert type(layer) is HQQLinear and layer.ready and layer.device == device
    assert same_state(dict(layer.state_dict()), before)
    assert same_state(layer.meta.copy(), meta)
    for name, value in (("W_q", W_q), ("scale", scale), ("zero", zero)):
        assert same_value(getattr(layer, name), value)
    assert isinstance(layer.W_q, nn.Parameter) and not layer.W_q.requires_grad
    assert torch.equal(layer.dequantize(), weight)
    assert torch.equal(layer.unpack(reshape=True), codes)
    assert layer.quant_config["weight_quant_params"]["nbits"] == kind[1]["nbits"]
    x = inputs(rng, 2)
    assert torch.equal(layer.matmul(x), x @ weight.t())
    layer.unprepare()
    assert layer.prepared is None and same_state(dict(layer.state_dict()), before)
    assert "backend" not in vars(layer)


def test_nothing_is_kept_twice(kind: Kind, layer: HQQLinear) -> None:
    q = layer.qtensor()
    layer.prepare(kind[0])
    stored = 4 if kind[0] == "cpu" and q.spec.max_code <= 15 else q.spec.format.bits
    codes = N * K * stored // 8
    held = sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers())) - layer.bias.nbytes
    assert held == layer.prepared.nbytes
    # Codes once, padded by less than a quarter here; metadata at most three times, and in float32 at most twice that.
    assert held <= codes * 1.25 + 6 * q.scale.nbytes + 6 * q.zero.nbytes + 4096 * (kind[0] == "native")


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5), (0,)], ids=str)
def test_products(kind: Kind, layer: HQQLinear, shape: tuple[int, ...], rng: torch.Generator) -> None:
    layer.prepare(kind[0])
    x = inputs(rng, *shape)
    y = layer(x)
    assert (y.shape, y.dtype) == ((*shape, N), torch.bfloat16)
    expected = exact(layer, x)
    assert float((y.double() - expected).norm()) <= BOUND * float(expected.norm())


def test_gradients_are_those_of_the_reference(kind: Kind, layer: HQQLinear, rng: torch.Generator) -> None:
    layer.bias.requires_grad_(True)
    x = inputs(rng, 4).requires_grad_(True)
    g = torch.randn(4, N, generator=rng).bfloat16()
    expected = torch.autograd.grad(layer(x), (x, layer.bias), g)
    layer.prepare(kind[0])
    for got, wanted in zip(torch.autograd.grad(layer(x), (x, layer.bias), g), expected, strict=True):
        assert torch.equal(got, wanted)
    (only_bias,) = torch.autograd.grad(layer(x.detach()), layer.bias, g)
    assert torch.equal(only_bias, expected[1])


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_prepared_and_independent(
    how: str, kind: Kind, layer: HQQLinear, rng: torch.Generator
) -> None:
    layer.prepare(kind[0])
    before = snapshot(layer)
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    x = inputs(rng, 3)
    assert type(other) is HQQLinear and other.prepared is not layer.prepared
    assert other.preparation == layer.preparation
    assert torch.equal(other(x), layer(x))
    other.unprepare()
    assert same_state(dict(other.state_dict()), before)
    other.W_q.data.zero_()
    assert layer.prepared is not None and same_state(dict(layer.state_dict()), before)


def test_casts_choose_again(kind: Kind, layer: HQQLinear, rng: torch.Generator) -> None:
    plain = copy.deepcopy(layer).to(torch.float32)
    layer.prepare(kind[0])
    before = snapshot(layer)
    assert layer.to(torch.float32) is layer
    assert layer.prepared is None and layer.compute_dtype == torch.float32
    assert layer.preparation.got == "pytorch" and "float32" in layer.preparation.reason
    assert same_state(dict(layer.state_dict()), dict(plain.state_dict()))
    x = inputs(rng, 3).float()
    assert torch.equal(layer(x), plain(x))
    layer.bfloat16()
    assert layer.prepared is not None and same_state(dict(layer.state_dict()), before)
    layer.compute_dtype = torch.float64
    assert layer.prepared is None and layer.dequantize().dtype == torch.float64


def test_moves_choose_again(kind: Kind, layer: HQQLinear, rng: torch.Generator) -> None:
    layer.prepare(kind[0])
    before = snapshot(layer)
    assert layer.cpu().prepared is not None
    layer.to("meta")
    assert layer.prepared is None and layer.device.type == "meta"
    assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"meta"}
    layer.to_empty(device="cpu")
    layer.load_state_dict(before)
    assert layer.prepared is not None and same_state(dict(layer.state_dict()), before)
    with pytest.raises(BackendError, match=r"move or cast the layer that holds it"):
        layer.prepared.to(torch.float16)


@pytest.mark.parametrize("inside", [False, True])
def test_loading_prepares_what_was_loaded(
    inside: bool, kind: Kind, layer: HQQLinear, rng: torch.Generator
) -> None:
    source = layer_of(kind, rng)
    layer.prepare(kind[0])
    if inside:
        model = nn.Sequential(layer)
        assert model.load_state_dict(nn.Sequential(source).state_dict()).missing_keys == []
        assert set(model.state_dict()) == {f"0.{key}" for key in source.state_dict()}
    else:
        layer.load_state_dict(source.state_dict())
    assert layer.prepared is not None
    assert same_state(dict(layer.state_dict()), dict(source.state_dict()))
    source.prepare(kind[0])
    x = inputs(rng, 3)
    assert torch.equal(layer(x), source(x))


def test_a_refused_state_changes_nothing(kind: Kind, layer: HQQLinear) -> None:
    layer.prepare(kind[0])
    prepared, before = layer.prepared, snapshot(layer)
    with pytest.raises(ShapeError, match="the layer's is"):
        layer.load_state_dict({**before, "shape": torch.tensor([K, N])})
    assert layer.prepared is prepared


def test_quantising_again_prepares_the_new_weight(kind: Kind, layer: HQQLinear, rng: torch.Generator) -> None:
    layer.prepare(kind[0])
    W = torch.randn(N, K, generator=rng)
    layer.quantize(W, **layer.quant_config)
    fresh = HQQLinear.from_weights(W, None, config(**kind[1]), torch.bfloat16, "cpu")
    assert layer.prepared is not None and same_value(layer.W_q, fresh.W_q)


@pytest.mark.parametrize("name", ["W_q", "scale", "meta", "meta item", "del W_q", "W_q None"])
def test_writing_ends_the_preparation(name: str, kind: Kind, layer: HQQLinear) -> None:
    layer.prepare(kind[0])
    before = snapshot(layer)
    if name == "meta":
        layer.meta = layer.meta.copy()
    elif name == "meta item":
        layer.meta["nbits"] = layer.meta["nbits"]
    elif name == "del W_q":
        kept = layer.W_q
        del layer.W_q
        assert layer.prepared is None and not layer.ready
        layer.W_q = kept
    elif name == "W_q None":
        kept = layer.W_q
        layer.W_q = None
        assert layer.prepared is None and not layer.ready
        layer.W_q = kept
    else:
        setattr(layer, name, getattr(layer, name))
    assert layer.prepared is None and layer.preparation is None
    assert same_state(dict(layer.state_dict()), before)


@ALLOW_SCRIPT_METHOD
@pytest.mark.filterwarnings(  # torch's own, from tracing any autograd.Function
    "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"
)
def test_one_graph_with_the_same_result(kind: Kind, layer: HQQLinear, rng: torch.Generator) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    layer.prepare(kind[0])
    x = inputs(rng, 3).requires_grad_(True)
    expected = layer(x)
    (grad,) = torch.autograd.grad(expected.sum(), x)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    y = compiled(x)
    assert torch.equal(y, expected)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], grad)
    assert counter.frame_count == 1
    with torch.no_grad():
        assert torch.equal(compiled(x), expected)


def test_autocast_gives_its_dtype(kind: Kind, layer: HQQLinear, rng: torch.Generator) -> None:
    layer.prepare(kind[0])
    x = inputs(rng, 3).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert torch.equal(layer(x), layer(x.bfloat16()))


def test_bad_inputs(kind: Kind, layer: HQQLinear, rng: torch.Generator) -> None:
    layer.prepare(kind[0])
    with pytest.raises(
        ShapeError, match=rf"got input of shape \(2, {K + 1}\); the layer takes \[\.\.\., {K}\]"
    ):
        layer(torch.ones(2, K + 1, dtype=torch.bfloat16))
    with pytest.raises(ShapeError, match=r"got input of shape \(\)"):
        layer(torch.ones((), dtype=torch.bfloat16))
    with pytest.raises(
        DtypeError, match=r"got input of torch\.float32; the layer computes in torch\.bfloat16"
    ):
        layer(torch.ones(2, K))


def test_adapters_on_a_prepared_layer(kind: Kind, layer: HQQLinear, rng: torch.Generator) -> None:
    plain = HQQLinearLoRA(copy.deepcopy(layer), {"r": 4, "lora_alpha": 8})
    layer.prepare(kind[0])
    adapter = HQQLinearLoRA(layer, {"r": 4, "lora_alpha": 8})
    for one in (plain, adapter):
        one.lora_A.data.fill_(0.01)
        one.lora_B.data.fill_(0.02)
    adapter(inputs(rng, 3)).sum().backward()
    assert bool(adapter.lora_B.grad.any())
    merged, expected = (one.merge_and_quantize(config(**kind[1])) for one in (adapter, plain))
    assert same_state(dict(merged.state_dict()), dict(expected.state_dict()))


def test_peft_trains_and_merges(kind: Kind, layer: HQQLinear, rng: torch.Generator) -> None:
    peft = pytest.importorskip("peft")
    expected = copy.deepcopy(layer)
    layer.prepare(kind[0])
    results = []
    for one in (layer, expected):
        torch.manual_seed(0)
        model = peft.get_peft_model(
            nn.Sequential(one), peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
        )
        x = inputs(rng, 3)
        model(x).sum().backward()
        merged = model.merge_and_unload()[0]
        assert isinstance(merged, HQQLinear)
        results.append(dict(merged.state_dict()))
    assert same_state(*results)


def test_tied_embeddings_keep_their_codes(kind: Kind, rng: torch.Generator) -> None:
    head = layer_of(kind, rng, bias=False)
    model = nn.ModuleDict({"embed": HQQEmbedding.sharing(head), "head": head})
    before, rows = dict(copy.deepcopy(model.state_dict())), model["embed"](torch.arange(5))
    prepare_for_inference(model, backend=kind[0], strict=True)
    assert head.prepared is not None and head.W_q is model["embed"].W_q
    x = inputs(rng, 3)
    expected = head(x)
    model = copy.deepcopy(model)
    assert model["head"].prepared is not None and model["head"].W_q is model["embed"].W_q
    model.to(torch.float32).to(torch.bfloat16)
    assert model["head"].prepared is not None and model["head"].W_q is model["embed"].W_q
    assert torch.equal(model["head"](x), expected)
    restore(model)
    assert model["head"].W_q is model["embed"].W_q
    assert torch.equal(model["embed"](torch.arange(5)), rows)
    assert same_state(dict(model.state_dict()), before)


def test_preparing_for_another_backend(kind: Kind, layer: HQQLinear, rng: torch.Generator) -> None:
    before, x = snapshot(layer), inputs(rng, 3)
    expected = layer(x)
    for name in ("cpu", "native", "pytorch", kind[0]):
        prepare_for_inference(layer, backend=name)
        assert same_state(dict(layer.state_dict()), before)
    assert layer.prepared is not None
    restore(layer)
    assert torch.equal(layer(x), expected)


def test_files_are_the_same(kind: Kind, layer: HQQLinear, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = nn.Sequential(layer)
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    prepare_for_inference(model, backend=kind[0], strict=True)
    save_file(model.state_dict(), tmp_path / "prepared.safetensors")
    plain, prepared = (load_file(tmp_path / f"{name}.safetensors") for name in ("plain", "prepared"))
    assert same_state(plain, prepared)


def test_only_prepared_layers_hold_weights(kind: Kind, layer: HQQLinear, rng: torch.Generator) -> None:
    other = layer_of(kind, rng)
    other.prepare(kind[0])
    with pytest.raises(BackendError, match=r"a layer that is not prepared; call prepare\(\.\.\.\) first"):
        layer.hold(other.prepared)
    small = HQQLinear(nn.Linear(K, 16), config(**kind[1]), compute_dtype=torch.bfloat16, device="cpu")
    small.prepare(kind[0])
    with pytest.raises(BackendError, match=rf"got a prepared weight of shape \({N}, {K}\); the layer's is"):
        small.hold(other.prepared)


def test_saved_models_are_the_same(kind: Kind, tmp_path: Path, rng: torch.Generator) -> None:
    """Equal layers, whose copies may come to lie at the same address one after the other, and one that is shared."""
    from safetensors.torch import load_file

    from hqq.models.checkpoint import save_quantized
    from hqq.models.report import stored_bytes
    from hqq.models.sharing import share_weight, sharing_layer

    layers = [layer_of(kind, rng) for _ in range(3)]
    model = nn.Sequential(*layers, sharing_layer(layers[0], nn.Embedding(N, K)))
    size, files = stored_bytes(model), []
    save_quantized(model, tmp_path / "plain")
    prepare_for_inference(model, backend=kind[0], strict=True)
    assert stored_bytes(model) == size
    assert [share_weight(layers[0], other) for other in model] == [True, False, False, True]
    save_quantized(model, tmp_path / "prepared")
    for name in ("plain", "prepared"):
        (file,) = (tmp_path / name).glob("*.safetensors")
        files.append(load_file(file))
    assert files[0].keys() == files[1].keys()
    assert same_state(*files)


def test_transformers_saves_every_layer(kind: Kind, rng: torch.Generator) -> None:
    pytest.importorskip("transformers")
    from hqq.integrations.transformers.adopt import state_without_aliases
    from hqq.integrations.transformers.summary import summarize

    model = nn.Sequential(*(layer_of(kind, rng) for _ in range(3)))
    before, summary = copy.deepcopy(state_without_aliases(model)), summarize(model, {})
    prepare_for_inference(model, backend=kind[0], strict=True)
    assert same_state(state_without_aliases(model), before)
    after = summarize(model, {})
    assert (after.layers, after.parameters, after.quantized) == (
        summary.layers,
        summary.parameters,
        summary.quantized,
    )
