"""PeftUtils on whole models: choosing layers, merging, and the files."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hqq.core.peft import HQQLinearGroupedProj, HQQLinearLoRA, PeftUtils, is_hqq_lora_layer
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.errors import ConfigError, CorruptCheckpointError, MissingKeysError, ShapeError

HIDDEN = 32
LORA = {"lora_type": "default", "r": 4, "lora_alpha": 8, "dropout": 0.05, "train_dtype": torch.float32}
PER_TAG = {"attn.q": LORA, "attn.v": {**LORA, "r": 2, "train_bias": True}, "mlp": None}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(HIDDEN, HIDDEN) for name in "qv"})
        self.mlp = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(torch.tanh(self.attn["q"](x)) * self.attn["v"](x))


class TinyModel(nn.Module):
    """Two blocks named as in the models of transformers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})
        self.lm_head = nn.Linear(HIDDEN, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.model["layers"]:
            x = block(x)
        return self.lm_head(x)


def tiny_model(seed: int, quantise: bool = True) -> TinyModel:
    torch.manual_seed(seed)
    model = TinyModel().requires_grad_(False)
    if quantise:
        for block in model.model["layers"]:
            block.attn["q"], block.attn["v"], block.mlp = (
                HQQLinear(layer, BaseQuantizeConfig(nbits=4, group_size=16), compute_dtype=torch.float32)
                for layer in (block.attn["q"], block.attn["v"], block.mlp)
            )
    return model


def randomise(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    return model


def inputs(rng: torch.Generator) -> torch.Tensor:
    return torch.randn(3, HIDDEN, generator=rng)


@pytest.mark.parametrize("quantise", [True, False])
def test_settings_go_to_the_layers_their_tags_name(quantise: bool, seed: int, rng: torch.Generator) -> None:
    model = tiny_model(seed, quantise).eval()
    model.lm_head.requires_grad_(True)
    x = inputs(rng)
    before = model(x)
    PeftUtils.add_lora(model, PER_TAG, verbose=False)
    torch.testing.assert_close(model(x), before)
    for i, block in enumerate(model.model["layers"]):
        assert (block.attn["q"].r, block.attn["v"].r) == (4, 2)
        assert not is_hqq_lora_layer(block.mlp)
        assert block.attn["q"].name == f"model.layers.{i}.attn.q"
    trainable = {name.split(".", 3)[3] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"attn.q.lora_A", "attn.q.lora_B", "attn.v.lora_A", "attn.v.lora_B", "attn.v.bias"}


def test_names_come_before_tags_and_tags_before_globs(seed: int) -> None:
    model = tiny_model(seed)
    params = {
        "attn.*": {**LORA, "r": 1},
        "model.layers.1.attn.q": {**LORA, "r": 3},
        "attn.q": {**LORA, "r": 2},
    }
    PeftUtils.add_lora(model, params, verbose=False)
    first, second = (block.attn for block in model.model["layers"])
    assert [first["q"].r, first["v"].r, second["q"].r, second["v"].r] == [2, 1, 3, 1]


def test_one_set_of_settings_is_for_every_linear_layer_but_the_head(seed: int) -> None:
    model = tiny_model(seed)
    PeftUtils.add_lora(model, {"lora_type": "grouped_proj", "proj_size": 4, "proj_num": 8}, verbose=False)
    adapters = [name for name, module in model.named_modules() if isinstance(module, HQQLinearGroupedProj)]
    assert len(adapters) == 6
    assert type(model.lm_head) is nn.Linear


def test_a_layer_used_in_two_places_gets_one_adapter(seed: int, rng: torch.Generator) -> None:
    model = tiny_model(seed)
    first, second = model.model["layers"]
    second.mlp = first.mlp
    PeftUtils.add_lora(model, {"mlp": LORA}, verbose=False)
    assert isinstance(first.mlp, HQQLinearLoRA)
    assert second.mlp is first.mlp


BAD_PARAMS: list[tuple[dict[str, Any], str]] = [
    (
        {"attn.q": LORA, "attn.k": LORA},
        r"\['attn.k'\], which fit no layer; expected some of attn.q, attn.v, lm_head",
    ),
    ({"attn.q": LORA, "mlp": {**LORA, "lora_type": "lorra"}}, "lora_type='lorra'; expected one of default"),
    ({"attn.q": LORA, "mlp": {"r": 4}}, "missing \\['lora_alpha'\\]"),
]


@pytest.mark.parametrize(("params", "message"), BAD_PARAMS)
def test_bad_parameters_raise_and_leave_the_model_as_it_was(
    params: dict[str, Any], message: str, seed: int
) -> None:
    model = tiny_model(seed)
    model.lm_head.requires_grad_(True)
    with pytest.raises(ConfigError, match=message):
        PeftUtils.add_lora(model, params, verbose=False)
    assert not any(is_hqq_lora_layer(module) for module in model.modules())
    assert model.lm_head.weight.requires_grad


def test_adapters_are_not_stacked_and_not_imagined(seed: int, tmp_path: Path) -> None:
    model = tiny_model(seed)
    for call in (
        lambda: PeftUtils.merge_lora(model, None, verbose=False),
        lambda: PeftUtils.cast_lora_weights(model, torch.float16),
        lambda: PeftUtils.save_lora_weights(model, tmp_path / "none.pt"),
    ):
        with pytest.raises(ConfigError, match="without adapters"):
            call()
    PeftUtils.add_lora(model, PER_TAG, verbose=False)
    with pytest.raises(ConfigError, match="has adapters already"):
        PeftUtils.add_lora(model, PER_TAG, verbose=False)


def weights_of(adapter: HQQLinearLoRA) -> tuple[torch.Tensor, ...]:
    """The frozen weight [N, K], A [K, r], B [r, N] and bias [N] in float64."""
    parts = (adapter.base_weight(), adapter.lora_A, adapter.lora_B, adapter.bias)
    return tuple(part.detach().double() for part in parts)


def merging_bounds(adapter: HQQLinearLoRA, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How far a merged weight [N, K] and its output for `x` may be from the exact weight and the adapter's output.

    The merged weight takes r products, the scaling and an addition, each relative to u; an output takes K products
    and the bias on top. The adapter's own output has x @ A, @ B, scaling and two additions. All are bounded by their
    number times u times the sum of magnitudes; 2u more than first order needs.
    """
    u = torch.finfo(torch.float32).eps / 2
    W, A, B, bias = (part.abs() for part in weights_of(adapter))
    magnitude = W + (A @ B).t() * adapter.scaling
    in_weight, in_sum = adapter.r + 4, HIDDEN + 2
    reach = x.double().abs() @ magnitude.t() + bias
    return in_weight * u * magnitude, 2 * (in_weight + in_sum) * u * reach


def test_merging_without_config_gives_linear_layers_with_the_same_output(
    seed: int, rng: torch.Generator
) -> None:
    model = tiny_model(seed)
    PeftUtils.add_lora(model, PER_TAG, verbose=False)
    randomise(model).eval()
    adapted = copy.deepcopy(model)
    PeftUtils.merge_lora(model, verbose=False)
    x = inputs(rng)
    for block, before in zip(model.model["layers"], adapted.model["layers"], strict=True):
        for name in "qv":
            _, allowed = merging_bounds(before.attn[name], x)
            difference = block.attn[name](x).double() - before.attn[name](x).double()
            assert bool((difference.abs() <= allowed).all())
    assert type(model.model["layers"][0].attn["q"]) is nn.Linear
    assert type(model.model["layers"][0].mlp) is HQQLinear
    PeftUtils.add_lora(model, PER_TAG, verbose=False)


def test_merging_quantises_where_a_config_is_given(seed: int, rng: torch.Generator) -> None:
    model = tiny_model(seed)
    PeftUtils.add_lora(model, PER_TAG, verbose=False)
    randomise(model).eval()
    adapted = copy.deepcopy(model)
    # Min-max, whose codes are the nearest to weights that all lie within its lattice.
    eight = BaseQuantizeConfig(nbits=8, group_size=16, solver="minmax")
    configs = {"attn.q": eight, "attn.v": None}
    PeftUtils.merge_lora(model, configs, verbose=False)
    u = torch.finfo(torch.float32).eps / 2
    x = inputs(rng)
    for block, before in zip(model.model["layers"], adapted.model["layers"], strict=True):
        q, v = block.attn["q"], block.attn["v"]
        assert (type(q), type(v)) == (HQQLinear, nn.Linear)
        assert q.quant_config["weight_quant_params"]["nbits"] == 8
        W, A, B, bias = weights_of(before.attn["q"])
        merged = W + (A @ B).t() * before.attn["q"].scaling
        rounding, products = merging_bounds(before.attn["q"], x)
        # Half a step, and float32's choice of a code and way back from it: four roundings of numbers up to zero + 255.
        scale, zero = (stat.double().expand(-1, 16).reshape(HIDDEN, HIDDEN) for stat in (q.scale, q.zero))
        allowed = scale * (0.5 + 8 * u * (zero.abs() + 255)) + rounding
        error = (q.dequantize().double() - merged).abs()
        assert bool((error <= allowed).all())
        # 1024 random weights do not all lie on lattices of 256 points.
        assert float(error.max()) > float(rounding.max())
        expected = x.double() @ merged.t() + bias
        outputs = (q(x).double() - expected).abs()
        assert bool((outputs <= x.double().abs() @ allowed.t() + products).all())
    with pytest.raises(ConfigError, match="without adapters"):
        PeftUtils.merge_lora(model, configs, verbose=False)


def test_cast_changes_adapters_only(seed: int) -> None:
    model = tiny_model(seed)
    PeftUtils.add_lora(model, PER_TAG, verbose=False)
    PeftUtils.cast_lora_weights(model, torch.bfloat16)
    block = model.model["layers"][0]
    assert block.attn["q"].lora_A.dtype is torch.bfloat16
    assert block.attn["q"].linear_layer.compute_dtype is torch.float32
    assert model.lm_head.weight.dtype is torch.float32


FAKE = {"nbits": 4, "group_size": 16}
TYPES = {
    "attn.q": {"lora_type": "lora_with_fakequant", "r": 2, "lora_alpha": 1, "quant_param": FAKE},
    "attn.v": {"lora_type": "grouped_proj", "proj_size": 4, "proj_num": 8, "zero_trainable": True},
    "mlp": LORA,
}


@pytest.mark.parametrize("params", [PER_TAG, TYPES], ids=["ranks", "types"])
def test_loading_brings_back_every_bit_with_or_without_adapters(
    params: dict[str, Any], seed: int, rng: torch.Generator, tmp_path: Path
) -> None:
    model, fresh, ready = tiny_model(seed), tiny_model(seed), tiny_model(seed)
    PeftUtils.add_lora(model, params, verbose=False)
    PeftUtils.add_lora(ready, params, verbose=False)
    randomise(model).eval()
    x, file = inputs(rng), tmp_path / "adapters.pt"
    PeftUtils.save_lora_weights(model, file)
    for other in (fresh, ready):
        PeftUtils.load_lora_weights(other, str(file), verbose=False)
        assert torch.equal(other.eval()(x), model(x))


def test_start_values_are_not_saved(seed: int, tmp_path: Path) -> None:
    model = tiny_model(seed)
    init = {"lora_A": torch.zeros(HIDDEN, 4), "lora_B": torch.zeros(4, HIDDEN)}
    PeftUtils.add_lora(model, {"mlp": {**LORA, "lora_init": init}}, verbose=False)
    PeftUtils.save_lora_weights(model, tmp_path / "adapters.pt")
    content = torch.load(tmp_path / "adapters.pt", weights_only=True)
    assert content["peft_config"] == {"mlp": LORA}
    assert set(content["parameters"]["model.layers.0.mlp"]) == {"lora_A", "lora_B", "scaling", "bias"}


def test_files_of_version_0_1_load_into_adapters_that_are_there(
    seed: int, rng: torch.Generator, tmp_path: Path
) -> None:
    model, other = tiny_model(seed), tiny_model(seed)
    PeftUtils.add_lora(model, PER_TAG, verbose=False)
    randomise(model).eval()
    PeftUtils.save_lora_weights(model, tmp_path / "new.pt")
    torch.save(torch.load(tmp_path / "new.pt", weights_only=True)["parameters"], tmp_path / "old.pt")
    with pytest.raises(ConfigError, match="without settings"):
        PeftUtils.load_lora_weights(other, tmp_path / "old.pt", verbose=False)
    PeftUtils.add_lora(other, PER_TAG, verbose=False)
    PeftUtils.load_lora_weights(other, tmp_path / "old.pt", verbose=False)
    x = inputs(rng)
    assert torch.equal(other.eval()(x), model(x))


def test_adapters_of_another_model_raise(seed: int, tmp_path: Path) -> None:
    model = tiny_model(seed)
    PeftUtils.add_lora(model, PER_TAG, verbose=False)
    file = tmp_path / "adapters.pt"
    PeftUtils.save_lora_weights(model, file)
    shorter = tiny_model(seed)
    del shorter.model["layers"][1]
    with pytest.raises(MissingKeysError, match=r"adapters for \['model.layers.1.attn.q'"):
        PeftUtils.load_lora_weights(shorter, file, verbose=False)
    other_rank = tiny_model(seed)
    PeftUtils.add_lora(other_rank, {**PER_TAG, "attn.v": {**PER_TAG["attn.v"], "r": 3}}, verbose=False)
    with pytest.raises(ShapeError, match="lora_A"):
        PeftUtils.load_lora_weights(other_rank, file, verbose=False)


class Touch:
    """Unpickling this creates a file: what loading must never do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_damaged_and_hostile_files_raise_and_run_nothing(seed: int, tmp_path: Path) -> None:
    model, file = tiny_model(seed), tmp_path / "adapters.pt"
    torch.save({"peft_config": {"mlp": LORA}, "parameters": {"x": Touch(tmp_path / "ran")}}, file)
    with pytest.raises(CorruptCheckpointError, match="more than tensors"):
        PeftUtils.load_lora_weights(model, file)
    assert not (tmp_path / "ran").exists()
    PeftUtils.add_lora(model, PER_TAG, verbose=False)
    PeftUtils.save_lora_weights(model, file)
    file.write_bytes(file.read_bytes()[:-400])
    with pytest.raises(CorruptCheckpointError, match="damaged"):
        PeftUtils.load_lora_weights(model, file)
    torch.save([1, 2], file)
    with pytest.raises(CorruptCheckpointError, match="no adapters"):
        PeftUtils.load_lora_weights(model, file)


ORIGINAL_SCRIPT = """
import sys, torch
from torch import nn
from hqq.core.peft import PeftUtils
from hqq.models.base import BasePatch, BaseHQQModel
from hqq.core.quantize import HQQLinear, BaseQuantizeConfig

class Base(BasePatch, BaseHQQModel):
    # The original's generic walk skips adapters, and so saves none; its classes for model families name the layers.
    @classmethod
    def patch_linearlayers(cls, model, patch_fct, patch_params, verbose=True):
        for name in ("proj", "mixed"):
            setattr(model, name, patch_fct(getattr(model, name), patch_params.get(name)))

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(32, 32)
        self.mixed = nn.Linear(32, 32, bias=False)

task, file = sys.argv[1:]
torch.manual_seed(0)
model = Tiny()
config = BaseQuantizeConfig(nbits=4, group_size=16)
model.proj = HQQLinear(model.proj, config, compute_dtype=torch.float32, device="cpu")
model.mixed = HQQLinear(model.mixed, config, compute_dtype=torch.float32, device="cpu")
x = torch.linspace(-1, 1, 64).reshape(2, 32)
if task == "write":
    params = {"proj": dict(lora_type="default", r=4, lora_alpha=8, dropout=0.1, train_dtype=torch.float32,
                           train_bias=True),
              "mixed": dict(lora_type="lora_with_fakequant", r=2, lora_alpha=8, train_dtype=torch.float32,
                            quant_param=None)}
    PeftUtils.add_lora(model, params, base_class=Base, verbose=False)
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.3)
    PeftUtils.save_lora_weights(model, file, base_class=Base, verbose=False)
else:
    model.base_class = Base
    PeftUtils.load_lora_weights(model, file, verbose=False)
model.eval()
torch.save({"x": x, "state": {name: {k: v for k, v in getattr(model, name).linear_layer.state_dict().items()}
                              for name in ("proj", "mixed")},
            "y": {name: getattr(model, name)(x).detach() for name in ("proj", "mixed")}}, file + ".out")
"""


@pytest.mark.original
@pytest.mark.skipif(
    "HQQ_ORIGINAL_PYTHON" not in os.environ,
    reason="HQQ_ORIGINAL_PYTHON names no interpreter with the original hqq",
)
def test_files_pass_to_the_original_and_back(tmp_path: Path) -> None:
    def original(task: str, file: Path) -> dict[str, Any]:
        script = tmp_path / "script.py"
        script.write_text(ORIGINAL_SCRIPT)
        command = [os.environ["HQQ_ORIGINAL_PYTHON"], str(script), task, str(file)]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        subprocess.run(command, check=True, cwd=tmp_path, env=environment, stdout=sys.stderr)
        return torch.load(f"{file}.out", weights_only=True)

    theirs = tmp_path / "theirs.pt"
    out = original("write", theirs)
    model = nn.Module()
    for name, state in out["state"].items():
        layer = HQQLinear(None, None, compute_dtype=torch.float32)
        layer.load_state_dict({key: value for key, value in state.items() if value is not None})
        model.add_module(name, layer)
    PeftUtils.load_lora_weights(model, theirs, verbose=False)
    model.eval()
    for name, y in out["y"].items():
        torch.testing.assert_close(getattr(model, name)(out["x"]), y, rtol=1e-4, atol=1e-4)

    ours = tmp_path / "ours.pt"
    PeftUtils.save_lora_weights(model, ours)
    again = original("read", ours)
    for name, y in again["y"].items():
        torch.testing.assert_close(y, out["y"][name], rtol=1e-4, atol=1e-4)
