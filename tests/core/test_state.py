"""State dicts: the wire format, what loads, what is refused, and that nothing else changes."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from hqq.core.embedding import HQQEmbedding
from hqq.core.linear import HQQLinear
from hqq.core.quantizer import Quantizer
from hqq.core.wire import decode_state, encode, encode_state
from hqq.errors import CorruptCheckpointError, DtypeError, HQQError, MissingKeysError, ShapeError, WeightError
from tests.core.layers import config, linear, quantized, same_state

KEYS = frozenset(
    [
        "W_q",
        "nbits",
        "group_size",
        "shape",
        "scale",
        "zero",
        "axis",
        "packing",
        "unpack_view_dtype",
        "view_as_float",
        "quant_scale",
        "quant_zero",
        "compute_dtype",
        "offload_meta",
        "encoded_state_dict",
        "stores_quant_config",
        "channel_wise",
        "optimize",
        "round_zero",
    ]
)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"nbits": 3, "axis": 0},
    {"nbits": 1.58},
    {"nbits": 8, "view_as_float": True},
    {"quant_zero": True},
    {"quant_scale": True},
    {"quant_zero": True, "quant_scale": True},
    {"quant_zero": True, "offload_meta": True},
)


def text(value: str) -> Tensor:
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


def empty(dtype: torch.dtype = torch.float32) -> HQQLinear:
    return HQQLinear(None, None, compute_dtype=dtype, device="cpu")


class TestEncoded:
    def test_keys_and_encodings(self, rng: torch.Generator) -> None:
        state = quantized(rng, torch.bfloat16).state_dict()
        assert len(KEYS) == 19
        assert set(state) == KEYS | {"bias"}
        assert all(isinstance(value, Tensor) and not value.requires_grad for value in state.values())
        for key, value in {"nbits": 4, "group_size": 32, "axis": 1}.items():
            assert (state[key].dtype, state[key].ndim, int(state[key])) == (torch.int32, 0, value)
        for key in ("packing", "compute_dtype", "unpack_view_dtype"):
            assert state[key].dtype == torch.uint8
        assert bytes(state["packing"].tolist()) == b"4bit_u8"
        assert bytes(state["compute_dtype"].tolist()) == b"torch.bfloat16"
        assert bytes(state["unpack_view_dtype"].tolist()) == b"torch.uint8"
        assert (state["shape"].dtype, state["shape"].tolist()) == (torch.int64, [24, 64])
        booleans = {
            key: bool(state[key]) for key in KEYS if state[key].dtype == torch.uint8 and state[key].ndim == 0
        }
        assert booleans == {
            "view_as_float": False,
            "quant_scale": False,
            "quant_zero": False,
            "offload_meta": False,
            "encoded_state_dict": True,
            "stores_quant_config": True,
            "channel_wise": True,
            "optimize": True,
            "round_zero": True,
        }
        assert state["scale"].dtype == state["zero"].dtype == state["bias"].dtype == torch.bfloat16
        assert (state["scale"].shape, state["W_q"].shape) == ((48, 1), (24, 32))

    @pytest.mark.parametrize(
        ("options", "dtype", "shape"),
        [
            ({"nbits": 4, "axis": 0}, torch.uint8, (16, 48)),
            ({"nbits": 3, "axis": 1}, torch.int32, (5, 32)),
            ({"nbits": 3, "axis": 0}, torch.int32, (4, 48)),
            ({"nbits": 8, "view_as_float": True}, torch.bfloat16, (48, 16)),
            ({"nbits": 3, "view_as_float": True}, torch.bfloat16, (5, 64)),
        ],
    )
    def test_codes(
        self, options: dict[str, Any], dtype: torch.dtype, shape: tuple[int, int], rng: torch.Generator
    ) -> None:
        W_q = quantized(rng, torch.bfloat16, **options).state_dict()["W_q"]
        assert (W_q.dtype, tuple(W_q.shape)) == (dtype, shape)

    def test_158_bits_are_a_float(self, rng: torch.Generator) -> None:
        nbits = quantized(rng, nbits=1.58).state_dict()["nbits"]
        assert (nbits.dtype, nbits.ndim) == (torch.float32, 0)
        assert float(nbits) == pytest.approx(1.58)

    def test_a_whole_number_given_as_float_is_an_integer(self, rng: torch.Generator) -> None:
        nested = config()
        nested["weight_quant_params"]["nbits"] = 4.0
        layer = HQQLinear(linear(rng), nested, device="cpu")
        assert layer.state_dict()["nbits"].dtype == torch.int32

    def test_without_bias_there_is_no_key(self, rng: torch.Generator) -> None:
        assert set(quantized(rng, bias=False).state_dict()) == KEYS

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_safetensors_takes_it(self, options: dict[str, Any], rng: torch.Generator) -> None:
        layer = quantized(rng, torch.bfloat16, **options)
        copied = empty(torch.bfloat16)
        copied.load_state_dict(load(save(dict(layer.state_dict()))))
        assert same_state(copied.state_dict(), layer.state_dict())
        assert torch.equal(copied.dequantize(), layer.dequantize())
        assert copied.quant_config["weight_quant_params"].keys() >= {"nbits", "group_size", "axis"}

    def test_keys_of_an_empty_layer(self) -> None:
        assert set(empty().state_dict()) == empty().state_dict_keys() == KEYS | {"bias"}
        assert set(empty().state_dict().values()) == {None}

    def test_destination_and_prefix(self, rng: torch.Generator) -> None:
        layer = quantized(rng)
        destination: OrderedDict[str, Any] = OrderedDict(other=1)
        destination._metadata = OrderedDict()  # type: ignore[attr-defined]
        assert layer.state_dict(destination=destination, prefix="a.b.") is destination
        assert set(destination) == {"other", *(f"a.b.{key}" for key in KEYS | {"bias"})}
        assert layer.state_dict(keep_vars=True)["W_q"] is layer.W_q


class TestRaw:
    def test_values_keep_their_types(self, rng: torch.Generator) -> None:
        layer = quantized(rng, torch.bfloat16, nbits=3)
        layer.encoded_state_dict = False
        state = layer.state_dict()
        assert set(state) == (KEYS | {"bias"}) - {"encoded_state_dict"}
        assert (state["nbits"], state["group_size"], state["axis"], state["packing"]) == (3, 32, 1, "3bit_32")
        assert state["shape"] == torch.Size([24, 64])
        assert (state["compute_dtype"], state["unpack_view_dtype"]) == (torch.bfloat16, torch.int32)
        assert state["stores_quant_config"] is True

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_through_torch_save(self, options: dict[str, Any], rng: torch.Generator) -> None:
        layer = quantized(rng, torch.bfloat16, **options)
        encoded = layer.state_dict()
        layer.encoded_state_dict = False
        file = io.BytesIO()
        torch.save(dict(layer.state_dict()), file)
        file.seek(0)
        copied = empty(torch.bfloat16)
        copied.load_state_dict(torch.load(file, weights_only=True))
        assert same_state(copied.state_dict(), encoded)


class TestLoading:
    @pytest.mark.parametrize("encoded", [True, False])
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_does_not_change_its_argument(
        self, options: dict[str, Any], encoded: bool, rng: torch.Generator
    ) -> None:
        layer = quantized(rng, **options)
        layer.encoded_state_dict = encoded
        state = dict(layer.state_dict())
        kept, before = dict(state), copy.deepcopy(state)
        target = empty()
        target.load_state_dict(state)
        target.W_q.data = target.W_q.data + 0
        target.to(torch.float16)
        assert state.keys() == kept.keys()
        assert all(state[key] is kept[key] for key in kept)
        assert same_state(state, before)

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_restores_every_attribute(self, options: dict[str, Any], rng: torch.Generator) -> None:
        layer = quantized(rng, torch.float16, **options)
        target = empty(torch.float16)
        target.load_state_dict(layer.state_dict())
        for name in (
            "in_features",
            "out_features",
            "axis",
            "channel_wise",
            "offload_meta",
            "compute_dtype",
            "ready",
        ):
            assert getattr(target, name) == getattr(layer, name), name
        expected = copy.deepcopy(layer.quant_config)
        expected["weight_quant_params"].pop("solver")  # the format has no place for it
        stats = [expected[f"{name}_quant_params"] for name in ("scale", "zero")]
        for params in stats:
            if params is not None and params["group_size"] is not None and 48 % params["group_size"]:
                params["group_size"] = 48  # what 48 scales were grouped by instead of 128
        assert target.quant_config == expected

    def test_the_layers_dtype_wins(self, rng: torch.Generator) -> None:
        state = quantized(rng, torch.bfloat16).state_dict()
        target = empty(torch.float16)
        target.load_state_dict(state)
        assert target.compute_dtype == target.scale.dtype == target.bias.dtype == torch.float16
        assert torch.equal(target.scale, state["scale"].half())

    def test_scales_that_the_layers_dtype_cannot_hold_are_refused(self, rng: torch.Generator) -> None:
        source = HQQLinear.from_weights(
            torch.randn(24, 64, generator=rng) * 1e8, None, config(), torch.bfloat16, "cpu"
        )
        target = empty(torch.float16)
        with pytest.raises(
            WeightError,
            match=r"beyond torch\.float16's largest .*load into a layer with compute_dtype=torch\.bfloat16",
        ):
            target.load_state_dict(source.state_dict())
        assert not target.ready

    def test_into_a_layer_of_another_shape(self, rng: torch.Generator) -> None:
        target = quantized(rng)
        before = copy.deepcopy(target.state_dict())
        other = HQQLinear(linear(rng, 48, 32), config(), compute_dtype=torch.float32, device="cpu")
        with pytest.raises(
            ShapeError, match=r"got a quantised weight of shape \(48, 32\); the layer's is \(24, 64\)"
        ):
            target.load_state_dict(other.state_dict())
        assert same_state(target.state_dict(), before)

    def test_another_setting_of_the_same_shape(self, rng: torch.Generator) -> None:
        target, source = quantized(rng), quantized(rng, nbits=3, axis=0, quant_zero=True)
        target.load_state_dict(source.state_dict())
        assert same_state(target.state_dict(), source.state_dict())
        target.load_state_dict(quantized(rng, bias=False).state_dict())
        assert target.bias is None
        assert set(target.state_dict()) == KEYS

    @pytest.mark.parametrize("key", ["W_q", "nbits", "shape", "axis", "scale", "zero"])
    @pytest.mark.parametrize("how", ["absent", "None"])
    def test_missing_keys(self, how: str, key: str, rng: torch.Generator) -> None:
        state = dict(quantized(rng).state_dict())
        if how == "absent":
            del state[key]
        else:
            state[key] = None
        target = quantized(rng)
        before = copy.deepcopy(target.state_dict())
        with pytest.raises(MissingKeysError, match=rf"missing keys \['{key}'\].*Was it written by hqq\?"):
            target.load_state_dict(state)
        assert same_state(target.state_dict(), before)

    @pytest.mark.parametrize(
        "key",
        [
            "stores_quant_config",
            "channel_wise",
            "optimize",
            "round_zero",
            "offload_meta",
            "quant_scale",
            "packing",
        ]
        + ["unpack_view_dtype", "view_as_float", "compute_dtype", "encoded_state_dict", "quant_zero"],
    )
    def test_keys_that_older_files_lack(self, key: str, rng: torch.Generator) -> None:
        source = quantized(rng)
        state = dict(source.state_dict())
        del state[key]
        target = empty()
        target.load_state_dict(state)
        assert torch.equal(target.dequantize(), source.dequantize())

    def test_unknown_keys(self, rng: torch.Generator) -> None:
        state = {**quantized(rng).state_dict(), "surprise": torch.ones(1)}
        with pytest.raises(MissingKeysError, match=r"unknown keys \['surprise'\]"):
            empty().load_state_dict(state)
        target = empty()
        result = target.load_state_dict(state, strict=False)
        assert result.unexpected_keys == ["surprise"]
        assert target.ready

    def test_another_libraries_state(self) -> None:
        with pytest.raises(KeyError, match="Was it written by hqq"):
            empty().load_state_dict(nn.Linear(4, 4).state_dict())
        with pytest.raises(MissingKeysError):
            empty().load_state_dict(empty().state_dict())


BAD_VALUES: dict[str, list[Any]] = {
    "W_q": [
        torch.zeros(24, 31, dtype=torch.uint8),
        torch.zeros(32, 24, dtype=torch.uint8),
        torch.zeros(768, dtype=torch.uint8),
    ]
    + [
        torch.zeros(24, 32, dtype=torch.int32),
        torch.zeros(24, 32),
        torch.zeros((), dtype=torch.uint8),
        "text",
        3,
    ],
    "nbits": [
        torch.tensor(7),
        torch.tensor(-1),
        torch.tensor(float("nan")),
        torch.tensor(float("inf")),
        torch.tensor([4, 4]),
    ]
    + [torch.tensor([], dtype=torch.int32), "four", 8, True, [4]],
    "group_size": [
        torch.tensor(7),
        torch.tensor(0),
        torch.tensor(-32),
        torch.tensor(16),
        torch.tensor(1.5),
        "32",
        2**40,
        True,
    ],
    "shape": [
        torch.tensor([24, 65]),
        torch.tensor([64, 0]),
        torch.tensor([-24, -64]),
        torch.tensor([1536]),
        torch.tensor([2, 12, 64]),
    ]
    + [torch.tensor([2**40, 2**40]), torch.tensor(1536), torch.tensor([24.5, 64.0]), "24x64", 5, [24, "64"]],
    "scale": [
        torch.ones(47, 1),
        torch.ones(1, 48),
        torch.ones(48),
        torch.ones(48, 1, dtype=torch.int32),
        torch.full((48, 1), float("nan")),
    ]
    + [torch.full((48, 1), float("inf")), "text", 1.0],
    "zero": [
        torch.ones(49, 1),
        torch.ones(1, 48),
        torch.ones(48, 1, dtype=torch.uint8),
        torch.full((48, 1), float("-inf")),
        "text",
    ],
    "axis": [torch.tensor(2), torch.tensor(-1), torch.tensor([0, 1]), torch.tensor(0.5), "1", True],
    "packing": [
        text("9bit_u8"),
        text("2bit_u8"),
        text("3bit_32"),
        text(""),
        torch.tensor([200, 201], dtype=torch.uint8),
    ]
    + [torch.tensor([300, -5]), "9bit_u8", 4],
    "unpack_view_dtype": [
        text("torch.nothing"),
        text("uint8; import os"),
        torch.tensor([255], dtype=torch.uint8),
    ],
    "compute_dtype": [
        text("torch.nothing"),
        text(""),
        text("__import__('os')"),
        torch.tensor([255], dtype=torch.uint8),
    ],
    "bias": [torch.ones(23), torch.ones(24, 1), torch.ones(64), "text"],
    "view_as_float": [torch.tensor([0, 1]), torch.tensor([], dtype=torch.uint8)],
    "quant_zero": [torch.tensor([0, 1])],
}


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key, values in BAD_VALUES.items() for value in values],
    ids=lambda value: str(value).replace("\n", "")[:40],
)
def test_corrupted_values_are_refused_and_change_nothing(key: str, value: Any, rng: torch.Generator) -> None:
    target = quantized(rng)
    before, config_before = copy.deepcopy(target.state_dict()), copy.deepcopy(target.quant_config)
    state = {**quantized(rng).state_dict(), key: value}
    with pytest.raises(HQQError, match="got |does not divide") as caught:
        target.load_state_dict(state)
    assert len(str(caught.value)) > 20
    assert same_state(target.state_dict(), before)
    assert target.quant_config == config_before
    with pytest.raises(type(caught.value), match="got |does not divide"):
        empty().load_state_dict(state)


@pytest.mark.parametrize("key", ["compute_dtype", "unpack_view_dtype"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_dtype_is_never_evaluated(nested: bool, key: str, tmp_path: Path, rng: torch.Generator) -> None:
    """The original runs `eval` on these bytes: a safetensors file could execute code."""
    proof = tmp_path / "executed"
    state = dict(quantized(rng, quant_zero=True).state_dict())
    name = f"meta_zero.{key}" if nested else key
    assert name in state
    state[name] = text(f"__import__('pathlib').Path({str(proof)!r}).touch()")
    with pytest.raises(DtypeError, match=r"got dtype name .*__import__.*; expected one of torch\.bfloat16"):
        empty().load_state_dict(state)
    assert not proof.exists()


@pytest.mark.parametrize(
    "value",
    [
        {"nbits": 8},
        {},
        "text",
        3,
        {"nbits": 8, "group_size": None, "shape": (48, 1), "axis": 0, "scale": torch.ones(())},
    ],
    ids=str,
)
def test_corrupted_nested_descriptions(value: Any, rng: torch.Generator) -> None:
    layer = quantized(rng, quant_zero=True)
    layer.encoded_state_dict = False
    state = {**layer.state_dict(), "meta_zero": value}
    with pytest.raises(HQQError, match="got "):
        empty().load_state_dict(state)


def test_quantised_stats_of_the_wrong_shape(rng: torch.Generator) -> None:
    state = dict(quantized(rng, quant_zero=True).state_dict())
    state["meta_zero.shape"] = torch.tensor([1, 48])
    with pytest.raises(ShapeError, match=r"got (zero|W_q) of shape"):
        empty().load_state_dict(state)


class TestInsideModels:
    def model(self, rng: torch.Generator) -> nn.Sequential:
        return nn.Sequential(
            quantized(rng), nn.LayerNorm(24), nn.ModuleDict({"deep": quantized(rng, nbits=3)})
        )

    @pytest.mark.parametrize("strict", [True, False])
    def test_round_trip(self, strict: bool, rng: torch.Generator) -> None:
        source = self.model(rng)
        target = nn.Sequential(empty(), nn.LayerNorm(24), nn.ModuleDict({"deep": empty()}))
        state = source.state_dict()
        assert set(state) == {
            *(f"0.{key}" for key in KEYS | {"bias"}),
            "1.weight",
            "1.bias",
            *(f"2.deep.{key}" for key in KEYS | {"bias"}),
        }
        result = target.load_state_dict(state, strict=strict)
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        assert same_state(dict(target.state_dict()), dict(state))

    def test_into_a_quantised_model(self, rng: torch.Generator) -> None:
        source, target = self.model(rng), self.model(rng)
        target.load_state_dict(source.state_dict())
        assert same_state(dict(target.state_dict()), dict(source.state_dict()))

    def test_missing_and_unexpected(self, rng: torch.Generator) -> None:
        source, target = self.model(rng), self.model(rng)
        state = source.state_dict()
        del state["0.scale"]
        state["2.deep.surprise"] = torch.ones(1)
        before = copy.deepcopy(dict(target[0].state_dict()))
        with pytest.raises(
            RuntimeError, match=r"(?s)0\.scale.*2\.deep\.surprise|2\.deep\.surprise.*0\.scale"
        ):
            target.load_state_dict(state)
        result = target.load_state_dict(state, strict=False)
        assert result.missing_keys == ["0.scale"]
        assert result.unexpected_keys == ["2.deep.surprise"]
        assert same_state(dict(target[0].state_dict()), before)

    def test_bad_values_name_the_layer(self, rng: torch.Generator) -> None:
        source, target = self.model(rng), self.model(rng)
        state = source.state_dict()
        state["2.deep.nbits"] = torch.tensor(7)
        with pytest.raises(RuntimeError, match=r"2\.deep: got nbits=7; expected one of"):
            target.load_state_dict(state)

    def test_nothing_for_a_layer_is_missing(self, rng: torch.Generator) -> None:
        target = nn.Sequential(empty())
        with pytest.raises(RuntimeError, match=r"0\.W_q"):
            target.load_state_dict({})
        assert "0.W_q" in target.load_state_dict({}, strict=False).missing_keys

    def test_a_bias_that_is_missing_is_named(self, rng: torch.Generator) -> None:
        target = nn.Sequential(quantized(rng))
        state = nn.Sequential(quantized(rng, bias=False)).state_dict()
        with pytest.raises(RuntimeError, match=r"0\.bias"):
            target.load_state_dict(state)

    def test_waiting_layers_save_and_load_their_weight(self, rng: torch.Generator) -> None:
        source, target = (
            nn.Sequential(HQQLinear(linear(rng), config(), device="cpu", initialize=False)) for _ in range(2)
        )
        target.load_state_dict(source.state_dict())
        for model in (source, target):
            model[0].initialize()
        assert same_state(dict(target.state_dict()), dict(source.state_dict()))


class TestOldLayers:
    """0.1.x stored {W_q, meta, bias}; with offload_meta, zero and scale were stacked in one tensor."""

    def offloaded(self, rng: torch.Generator, quantise: bool) -> tuple[dict[str, Any], Tensor]:
        W = torch.randn(64, 128, generator=rng)
        W_q, meta = Quantizer.quantize(W, nbits=4, group_size=64, axis=0, solver="hqq")
        stats = {}
        for name in ("scale", "zero"):
            stats[name] = meta.pop(name).half()
            if quantise:
                codes, nested = Quantizer.quantize(stats[name], nbits=8, group_size=128, optimize=False)
                nested["scale"], nested["zero"] = nested["scale"].half(), nested["zero"].half()
                nested["compute_dtype"] = torch.float16
                meta[f"meta_{name}"] = nested
                stats[name], expected = codes, Quantizer.dequantize(codes, nested)
                stats[f"{name}_value"] = expected
            else:
                stats[f"{name}_value"] = stats[name]
        meta["zero_scale"] = torch.stack((stats["zero"], stats["scale"]))
        meta["compute_dtype"] = torch.float16
        codes = torch.cat([W_q >> 4, W_q & 15]).half()
        expected = ((codes - stats["zero_value"]) * stats["scale_value"]).reshape(64, 128)
        return {"W_q": W_q, "meta": meta, "bias": None}, expected

    @pytest.mark.parametrize("quantise", [False, True])
    def test_stacked_zero_and_scale(self, quantise: bool, rng: torch.Generator) -> None:
        state, expected = self.offloaded(rng, quantise)
        before = copy.deepcopy(state)
        layer = empty(torch.float16)
        layer.load_state_dict(state)
        assert same_state(state, before)
        assert torch.equal(layer.dequantize(), expected)
        assert layer(torch.ones(2, 128).half()).shape == (2, 64)
        for encoded in (True, False):
            layer.encoded_state_dict = encoded
            again = empty(torch.float16)
            again.load_state_dict(layer.state_dict())
            assert torch.equal(again.dequantize(), expected)

    def test_incomplete(self, rng: torch.Generator) -> None:
        state, _ = self.offloaded(rng, False)
        for key in ("nbits", "shape", "axis", "zero_scale"):
            broken = {**state, "meta": {name: value for name, value in state["meta"].items() if name != key}}
            with pytest.raises(HQQError, match="got "):
                empty().load_state_dict(broken)
        with pytest.raises(MissingKeysError, match="W_q"):
            empty().load_state_dict({"meta": state["meta"]})


class TestQuantisedStats:
    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
    @pytest.mark.parametrize(("quant_zero", "quant_scale"), [(True, False), (False, True), (True, True)])
    def test_what_they_stand_for(
        self, quant_zero: bool, quant_scale: bool, nbits: int, axis: int, rng: torch.Generator
    ) -> None:
        original = linear(rng, 64, 128)
        plain = HQQLinear(original, config(nbits, axis=axis), False, torch.float32, "cpu")
        nested = config(nbits, axis=axis, quant_zero=quant_zero, quant_scale=quant_scale)
        layer = HQQLinear(original, nested, False, torch.float32, "cpu")
        assert torch.equal(layer.W_q, plain.W_q)
        meta = layer.meta
        assert (meta["quant_zero"], meta["quant_scale"]) == (quant_zero, quant_scale)
        for name, is_quantised, groups in (("zero", quant_zero, 1), ("scale", quant_scale, 2)):
            stat = getattr(plain, name)
            if not is_quantised:
                assert torch.equal(meta[name], stat)
                continue
            assert name not in meta
            assert meta[f"{name}_q"].dtype == torch.uint8
            inner = meta[f"meta_{name}"]
            assert (inner["nbits"], inner["scale"].numel()) == (8, groups)
            restored = Quantizer.dequantize(meta[f"{name}_q"], inner)
            assert restored.shape == stat.shape
            # half of the widest group's 255th part
            step = float(stat.max() - stat.min()) / 255
            assert float((restored - stat).abs().max()) <= 0.5 * step * (1 + 1e-3)
        zero = Quantizer.dequantize(meta["zero_q"], meta["meta_zero"]) if quant_zero else meta["zero"]
        scale = Quantizer.dequantize(meta["scale_q"], meta["meta_scale"]) if quant_scale else meta["scale"]
        assert torch.equal(layer.dequantize(), ((layer.unpack() - zero) * scale).view(64, 128))

    def test_embeddings_too(self, rng: torch.Generator) -> None:
        table = nn.Embedding(30, 16)
        layer = HQQEmbedding.from_embedding(
            table, config(group_size=8, quant_zero=True), torch.float32, "cpu"
        )
        copied = HQQEmbedding(compute_dtype=torch.float32, device="cpu")
        copied.load_state_dict(layer.state_dict())
        ids = torch.tensor([[0, 29], [3, 3]])
        assert torch.equal(copied(ids), layer(ids))


class TestEncoding:
    def test_each_type(self) -> None:
        values = {
            "shape": torch.Size([3, 4]),
            "packing": "4bit_u8",
            "compute_dtype": torch.float16,
            "nbits": 1.58,
            "group_size": 64,
            "quant_zero": True,
        }
        encoded = encode_state(values)
        assert all(isinstance(value, Tensor) for value in encoded.values())
        assert decode_state(encoded) == values
        assert decode_state(values) == values
        assert encode_state({"a": None, "meta_zero": {"nbits": 8}}).keys() == {"meta_zero.nbits"}

    def test_other_types_are_refused(self) -> None:
        with pytest.raises(TypeError, match="got a value of type set; expected a tensor"):
            encode({1})

    def test_values_that_do_not_decode(self) -> None:
        with pytest.raises(CorruptCheckpointError, match=r"got nbits as a tensor of shape \(2,\)"):
            decode_state({"nbits": torch.ones(2)})
