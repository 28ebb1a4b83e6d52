"""gemlite itself, which cannot be imported without a GPU: its kernels in the place of our layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hqq import quantize_model
from hqq.core.lora import HQQLinearLoRA
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.errors import BackendError
from hqq.utils.patching import patch_linearlayers

N, K = 256, 512

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="gemlite needs a CUDA device"),
    # What gemlite, and the kernels that it tunes, warn of is their own.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(autouse=True)
def gemlite() -> Any:
    return pytest.importorskip("gemlite", reason="gemlite is not installed", exc_type=ImportError)


def layer(nbits: int, dtype: torch.dtype, group_size: int = 64, axis: int = 1) -> HQQLinear:
    linear = nn.Linear(K, N)
    nn.init.normal_(linear.bias)
    config = BaseQuantizeConfig(nbits=nbits, group_size=group_size, axis=axis)
    return HQQLinear(linear, config, compute_dtype=dtype, device="cuda")


def assert_near(found: Tensor, expected: Tensor) -> None:
    # The same codes; scale, product and sum are rounded to 16 bits in other places.
    assert (found - expected).float().norm() < 2**-5 * expected.float().norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nbits", [8, 4, 2, 1])
def test_takes_a_layer(nbits: int, dtype: torch.dtype) -> None:
    from hqq.backends.gemlite import patch_hqq_to_gemlite

    source = layer(nbits, dtype)
    inputs = [torch.randn(rows, K, device="cuda", dtype=dtype) for rows in (1, 5, 64)]
    expected = [source(x) for x in inputs]
    new = patch_hqq_to_gemlite(source, None)
    assert type(new).__module__.startswith("gemlite")
    assert not source.ready
    for x, wanted in zip(inputs, expected, strict=True):
        assert_near(new(x), wanted)


def test_whole_model_and_adapters() -> None:
    from hqq.backends.gemlite import patch_hqq_to_gemlite

    model = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K)).half()
    quantize_model(model, BaseQuantizeConfig(nbits=4, group_size=64), device="cuda", progress=False)
    model[2] = HQQLinearLoRA(model[2], {"r": 4, "lora_alpha": 4, "train_dtype": torch.float16})
    x = torch.randn(3, K, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        expected = model(x)
        patch_linearlayers(model, patch_hqq_to_gemlite)
        assert not any(isinstance(module, HQQLinear) for module in model.modules())
        assert_near(model(x), expected)


@pytest.mark.parametrize(("nbits", "axis"), [(3, 1), (4, 0)])
def test_what_it_does_not_take_stays(nbits: int, axis: int) -> None:
    from hqq.backends.gemlite import patch_hqq_to_gemlite

    source = layer(nbits, torch.float16, axis=axis)
    with pytest.raises(BackendError, match="gemlite takes"):
        patch_hqq_to_gemlite(source, None)
    assert source.ready


def test_gemlites_own_patching_of_a_model() -> None:
    """`patch_model` quantises linear layers through this library, and leaves those that are quantised already."""
    from gemlite.helper import A16W4_HQQ_INT, patch_model

    model = nn.ModuleDict({"a": nn.Linear(K, N), "b": nn.Linear(N, K), "lm_head": nn.Linear(K, 8)}).half()
    config = BaseQuantizeConfig(nbits=4, group_size=64)
    x = torch.randn(3, K, device="cuda", dtype=torch.float16)
    wanted = HQQLinear(model["a"], config, del_orig=False, device="cuda")(x)
    model["b"] = HQQLinear(model["b"], config, device="cuda")
    patch_model(model, device="cuda:0", processor=A16W4_HQQ_INT(device="cuda:0"))
    assert type(model["a"]).__module__.startswith("gemlite")
    assert_near(model["a"](x), wanted)
    assert isinstance(model["b"], HQQLinear) and model["b"].ready
    assert isinstance(model["lm_head"], nn.Linear)
