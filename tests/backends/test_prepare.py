"""prepare_for_inference chooses per layer, says why, changes nothing else, and can be undone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hqq import HQQBackend, HQQLinear, QuantConfig, quantize_model
from hqq.backends import compiled
from hqq.backends.patching import (
    patch_add_quant_config,
    patch_add_weight_param,
    patch_hqq_inference,
    patch_linearlayers,
    patch_lora_inference,
    recommended_inductor_config_setter,
)
from hqq.backends.prepare import prepare_for_inference, quantized_layers, restore
from hqq.core import choice
from hqq.core.lora import HQQLinearLoRA
from hqq.core.qtensor import QSpec
from hqq.core.quantized_module import QuantizedModule
from hqq.errors import BackendError
from tests.core.layers import same_state

HAS_CUDA = torch.cuda.is_available()


class Block(nn.Module):
    """Two linear layers, one of them shared under two names, and one inside an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.b = nn.Linear(64, 64)
        self.c = nn.Linear(64, 32)
        self.also_b = self.b

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(torch.relu(self.also_b(self.b(self.a(x)))))
        return out


@pytest.fixture
def model(seed: int) -> Block:
    torch.manual_seed(seed)
    model = Block()
    quantize_model(model, QuantConfig(nbits=4, group_size=32), progress=False, skip=())
    layer: Any = model.c
    model.c = HQQLinearLoRA(layer, {"r": 4, "lora_alpha": 8, "dropout": 0.5})  # type: ignore[assignment]
    return model.eval()


class Picky:
    """A backend that takes only layers of 64 rows."""

    name = "triton"

    def available(self) -> str | None:
        return None

    def supports(self, spec: QSpec, compute_dtype: torch.dtype, device: torch.device) -> str | None:
        return None if spec.shape[0] == 64 else f"takes 64 rows, got {spec.shape[0]}"

    def dequantize(self, *args: Any) -> Tensor:
        W_q, scale, zero, spec, dtype = args
        from hqq.core.backend import EAGER

        return 2 * EAGER.dequantize(W_q, scale, zero, spec, dtype)


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the Triton kernels, on the CPU too."""
    from hqq.backends import triton

    monkeypatch.setattr(triton, "BACKEND", Picky())
    monkeypatch.setitem(choice._DEFAULT, "cpu", ("triton", "pytorch"))


def test_each_layer_gets_its_own_choice_with_a_reason(model: Block, picky: None) -> None:
    weight = model.a.dequantize()  # type: ignore[operator]
    report = prepare_for_inference(model)
    assert [(row.layer, row.got) for row in report.layers] == [
        ("a", "triton"),
        ("b", "triton"),
        ("c.linear_layer", "pytorch"),
    ]
    assert [row.reason for row in report.layers] == [None, None, "takes 64 rows, got 32"]
    assert report.missed == ()
    assert torch.equal(model.a.dequantize(), 2 * weight)  # type: ignore[operator]
    assert HQQLinear.backend is HQQBackend.PYTORCH
    assert str(report).splitlines() == [
        "asked for 'default': 3 quantised layers",
        "2 with 'triton'",
        "1 with 'pytorch': takes 64 rows, got 32",
    ]
    assert report.to_dict()["layers"][2]["reason"] == "takes 64 rows, got 32"


def test_what_was_asked_and_not_got_is_missed_or_raised(model: Block, picky: None) -> None:
    with pytest.raises(
        BackendError, match=r"1 of 3 layers that cannot use 'triton', first c\.linear_layer: takes 64"
    ):
        prepare_for_inference(model, backend="triton", strict=True)
    assert not any("backend" in vars(module) for module in model.modules())
    report = prepare_for_inference(model, backend="triton")
    assert [(row.layer, row.got) for row in report.missed] == [("c.linear_layer", "pytorch")]
    prepare_for_inference(model, backend="default", strict=True)


def test_restore_brings_back_what_was_there(model: Block, picky: None) -> None:
    layer: Any = model.b
    layer.backend = HQQBackend.PYTORCH_COMPILE
    state, x = copy.deepcopy(model.state_dict()), torch.randn(3, 64)
    prepare_for_inference(model)
    assert same_state(dict(state), dict(model.state_dict()))
    prepare_for_inference(model, backend="pytorch")
    expected = model(x)
    assert restore(model) is model
    assert layer.backend is HQQBackend.PYTORCH_COMPILE
    assert "backend" not in vars(model.a)
    layer.backend = HQQBackend.PYTORCH
    assert torch.equal(model(x), expected)
    assert same_state(dict(state), dict(model.state_dict()))


def test_copies_stay_prepared_and_restore_alone(model: Block, picky: None) -> None:
    prepare_for_inference(model)
    copied = copy.deepcopy(model)
    restore(copied)
    assert model.a.selection().backend.name == "triton"  # type: ignore[operator]
    assert copied.a.selection().backend.name == "pytorch"  # type: ignore[operator]


@pytest.mark.skipif(HAS_CUDA, reason="about machines without CUDA")
def test_default_in_float32_on_the_cpu_is_torch_and_says_so(
    model: Block, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        report = prepare_for_inference(model, verbose=True)
    assert {row.got for row in report.layers} == {"pytorch"}
    assert {row.reason for row in report.layers} == {
        "torch's int4 product is used in bfloat16, not in torch.float32"
    }
    assert [record.getMessage() for record in caplog.records] == [str(report)]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
def test_default_on_a_gpu_in_float32_is_triton(model: Block) -> None:
    model = model.cuda()
    x = torch.randn(3, 64, device="cuda")
    expected = model(x)
    report = prepare_for_inference(model, strict=True)
    assert {row.got for row in report.layers} == {"triton"}
    assert all(row.reason for row in report.layers)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_a_prepared_model_is_one_graph_with_the_same_result(model: Block) -> None:
    from torch._dynamo.testing import CompileCounter

    prepare_for_inference(model)
    x = torch.randn(3, 64)
    counter = CompileCounter()
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(torch.compile(model, backend=counter, fullgraph=True)(x), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["torchao", "Triton", "", "HQQBackend.TRITON"])
def test_unknown_backends(name: str, model: Block) -> None:
    with pytest.raises(BackendError, match=rf"got backend='{name}', .* one of 'default', 'auto', 'native', "):
        prepare_for_inference(model, backend=name)


@pytest.mark.parametrize("name", choice.BACKEND_NAMES)
def test_every_name_prepares_or_says_what_is_missing(name: str, model: Block) -> None:
    state, x = copy.deepcopy(model.state_dict()), torch.randn(3, 64)
    expected = model(x)
    missing = choice.unavailable(name)
    if name in choice.EXTERNAL and missing is not None:
        with pytest.raises(BackendError, match=f"got backend='{name}', which is not available here: "):
            prepare_for_inference(model, backend=name)
        assert all(layer.preparation is None for layer in quantized_layers(model).values())
        return
    report = prepare_for_inference(model, backend=name)
    assert [row.asked for row in report.layers] == [name] * 3
    assert all(row.fulfilled or row.reason for row in report.layers)
    if name != "pytorch_compile":  # whose compiler's own warnings would be errors here
        torch.testing.assert_close(model(x), expected)
    restore(model)
    assert same_state(dict(state), dict(model.state_dict()))


def test_a_failing_preparation_leaves_the_model_as_it_was(
    model: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_for_inference(model, backend="pytorch_compile")
    before = {name: layer.preparation for name, layer in quantized_layers(model).items()}
    real, calls = QuantizedModule.prepare, []

    def failing(layer: QuantizedModule, asked: str, keep_codes: bool = False) -> Any:
        calls.append(asked)
        if len(calls) == 3:
            raise MemoryError("third layer")
        return real(layer, asked, keep_codes)

    monkeypatch.setattr(QuantizedModule, "prepare", failing)
    with pytest.raises(MemoryError, match="third layer"):
        prepare_for_inference(model, backend="pytorch")
    monkeypatch.undo()
    assert {name: layer.preparation for name, layer in quantized_layers(model).items()} == before


def test_models_without_quantised_layers() -> None:
    with pytest.raises(BackendError, match="got Linear without quantised layers; quantise it"):
        prepare_for_inference(nn.Linear(4, 4))


def test_compilation_without_a_compiler_is_refused(model: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    compiled._missing.cache_clear()
    try:
        report = prepare_for_inference(model.cpu(), backend="pytorch_compile")
    finally:
        compiled._missing.cache_clear()
    assert {row.got for row in report.missed} == {"pytorch"}
    assert report.missed[0].reason is not None
    assert "no no-such-compiler -O2" in report.missed[0].reason


def test_patch_linearlayers_replaces_layers_and_adapters_once(model: Block) -> None:
    calls: list[nn.Module] = []

    def patch(layer: nn.Module, param: str) -> nn.Module:
        assert param == "param"
        calls.append(layer)
        return nn.Identity() if layer is b else layer

    a, b, c = model.a, model.b, model.c
    patch_linearlayers(model, patch, "param")
    assert calls == [a, b, c]
    assert isinstance(model.b, nn.Identity)
    assert model.also_b is model.b
    assert model.c is c


def test_patch_functions_of_old_scripts(model: Block) -> None:
    layer: Any = model.a
    config = copy.deepcopy(layer.quant_config)
    layer.quant_config = None
    keys = list(model.state_dict())
    patch_linearlayers(model, patch_add_quant_config)
    for key in ("nbits", "group_size", "axis"):
        assert layer.quant_config["weight_quant_params"][key] == config["weight_quant_params"][key]
    again = HQQLinear(
        nn.Linear(64, 64), {**layer.quant_config, "offload_meta": False}, compute_dtype=torch.float32
    )
    assert again.qtensor().spec == layer.qtensor().spec
    patch_linearlayers(model, patch_hqq_inference)
    assert layer.backend is HQQBackend.PYTORCH or HAS_CUDA
    model.train()
    patch_linearlayers(model, patch_lora_inference)
    x = torch.randn(3, 64)
    assert torch.equal(model.c(x), model.c(x))  # without dropout
    patch_linearlayers(model, patch_add_weight_param, {"device": "cpu", "dtype": torch.float32})
    dummy = model.c.weight
    assert (tuple(dummy.shape), dummy.dtype, float(dummy)) == ((1,), torch.float32, 0.0)
    assert list(model.state_dict()) == keys


def test_recommended_settings_of_inductor() -> None:
    from torch._inductor import config

    precision = torch.get_float32_matmul_precision()
    with config.patch(coordinate_descent_tuning=False, force_fuse_int_mm_with_mul=False):
        try:
            recommended_inductor_config_setter()
            assert config.coordinate_descent_tuning
            assert config.force_fuse_int_mm_with_mul
            assert torch.get_float32_matmul_precision() == "high"
        finally:
            torch.set_float32_matmul_precision(precision)
