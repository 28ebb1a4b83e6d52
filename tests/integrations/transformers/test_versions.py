"""What every supported version of transformers has to do with HQQ. One class is one row of the matrix.

The same file runs in an environment of each version: see tests/matrix.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import HqqConfig

from hqq import load_quantized
from hqq.core.config import BaseQuantizeConfig, QuantConfig
from hqq.core.experts import HQQExperts
from hqq.core.linear import HQQLinear
from hqq.errors import HQQError
from hqq.integrations.transformers import support
from tests.integrations.transformers.models import (
    BUILDERS,
    MIXTURES,
    NEED_REPAIR,
    VERSION,
    assert_same,
    experts,
    full_weight,
    inputs,
    logits,
    make_dense,
    open_model,
    quantized,
    save,
)

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden" / "model"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
REPAIRED = VERSION >= (4, 57)
FUSED = VERSION >= (5, 0)
DENSE_MODELS = tuple(
    name for name in BUILDERS if name not in MIXTURES and (REPAIRED or name not in NEED_REPAIR)
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, module_seed: int) -> Iterator[Any]:
    """A function from a model's name to the folder it is saved in, with fresh weights."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save(name, tmp_path_factory.mktemp(name), module_seed)
        return made[name]

    return folder


def config(nbits: float = 4, group_size: int = 32, **settings: Any) -> HqqConfig:
    return HqqConfig(nbits=nbits, group_size=group_size, **settings)


def check_codes(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Every layer holds the codes of its own weight, as the library gives them for the weight in `dtype`."""
    # transformers 4.56 casts a weight after it has been quantised.
    dense = open_model(folder, dtype if REPAIRED else torch.float32)
    for name, layer in quantized(model).items():
        W = full_weight(dense, name)
        settings = {**layer.quant_config, "offload_meta": False}
        expected = HQQLinear.from_weights(W, None, settings, layer.compute_dtype, "cpu")
        assert torch.equal(layer.W_q, expected.W_q), name
    for name, stacked in experts(model).items():
        W = full_weight(dense, name)
        expected = HQQExperts.from_weights(W, {**stacked.quant_config, "offload_meta": False}, dtype)
        assert torch.equal(stacked.W_q, expected.W_q), name


class TestQuantize:
    """quantise in from_pretrained"""

    @pytest.mark.parametrize("name", DENSE_MODELS)
    def test_every_linear_layer_becomes_codes_of_its_own_weight(self, name: str, folders: Any) -> None:
        model = open_model(folders(name), quantization_config=config())
        # Heads, and layers that the model does not call but reads.
        left = ("lm_head", "proj_out", "mixer.dt_proj", "head.attention.out_proj")
        full = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith(left)]
        assert full == []
        assert len(quantized(model)) > 0
        check_codes(model, folders(name), torch.bfloat16)

    def test_bias_is_kept(self, folders: Any) -> None:
        model, dense = open_model(folders("opt"), quantization_config=config()), open_model(folders("opt"))
        biases = {name: layer.bias for name, layer in quantized(model).items()}
        parameters = dict(dense.named_parameters())
        assert len(biases) == 12
        for name, bias in biases.items():
            assert torch.equal(bias, parameters[f"{name}.bias"])

    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
    def test_settings_reach_the_layers(self, nbits: int, axis: int, folders: Any) -> None:
        model = open_model(folders("llama"), quantization_config=config(nbits, 64, axis=axis))
        specs = {
            (q.spec.nbits, q.spec.group_size, q.spec.axis)
            for q in (x.qtensor() for x in quantized(model).values())
        }
        assert specs == {(nbits, 64, axis)}

    @pytest.mark.parametrize("rule", ["down_proj", "mlp.down_proj", "model.layers.1.mlp.down_proj"])
    def test_skip_modules_by_name_part_or_tag(self, rule: str, folders: Any) -> None:
        if not REPAIRED and "." not in rule:
            pytest.skip("transformers 4.56 is as it was")
        model = open_model(folders("llama"), quantization_config=config(skip_modules=["lm_head", rule]))
        kinds = {n: type(m) for n, m in model.named_modules() if n.endswith("_proj")}
        for name, kind in kinds.items():
            assert (kind is nn.Linear) == (rule in name), name

    def test_config_survives_as_json(self) -> None:
        made = config(3, 64, axis=0, skip_modules=["lm_head", "x"])
        read = json.loads(json.dumps(made.to_dict()))
        assert HqqConfig.from_dict(read).to_dict() == made.to_dict()

    def test_device_map(self, folders: Any) -> None:
        pytest.importorskip("accelerate")
        device_map = {"device_map": "auto"} if torch.cuda.is_available() or REPAIRED else {}
        model = open_model(folders("llama"), quantization_config=config(), **device_map)
        given = {k: v.to(model.device) for k, v in inputs(model).items()}
        assert torch.equal(logits(model, given), logits(make_dense(copy.deepcopy(model)), given))

    def test_layers_on_disk_are_refused(self, folders: Any, tmp_path: Path) -> None:
        pytest.importorskip("accelerate")
        device_map = {"model": "cpu", "lm_head": "disk"}
        with pytest.raises(ValueError, match="disk"):
            open_model(
                folders("llama"), quantization_config=config(), device_map=device_map, offload_folder=tmp_path
            )


class TestForward:
    """forward and generate in bf16, fp16 and fp32"""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", DENSE_MODELS)
    def test_forward_is_that_of_the_dequantised_model(
        self, name: str, dtype: torch.dtype, folders: Any
    ) -> None:
        model = open_model(folders(name), dtype, quantization_config=config(8))
        dense = open_model(folders(name), dtype)
        for layer_name, layer in quantized(model).items():
            # Some layers of T5 stay in float32 in a model of float16.
            assert layer.compute_dtype == (full_weight(dense, layer_name).dtype if REPAIRED else dtype), (
                layer_name
            )
        given = inputs(model)
        result = logits(model, given)
        assert result.dtype == logits(dense, given).dtype
        assert_same(make_dense(model), given, result)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", ["llama", "qwen2", "opt", "t5", "whisper", "llava", "qwen2-vl"])
    def test_generate_takes_the_likeliest_tokens(self, name: str, dtype: torch.dtype, folders: Any) -> None:
        model = open_model(folders(name), dtype, quantization_config=config())
        given = {k: v for k, v in inputs(model).items() if not k.startswith("decoder")}
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        if "input_ids" in given:
            given["attention_mask"] = torch.ones_like(given["input_ids"])
        tokens = model.generate(**given, **options)
        assert torch.equal(tokens, make_dense(model).generate(**given, **options))

    def test_dtype_asked_for_wins_over_the_one_in_the_files(self, tmp_path: Path) -> None:
        folder = save("llama", tmp_path / "half", 1, torch.float16)
        model = open_model(folder, torch.bfloat16, quantization_config=config())
        assert {layer.compute_dtype for layer in quantized(model).values()} == {torch.bfloat16}
        assert logits(model, inputs(model)).dtype == torch.bfloat16

    def test_cast_to_another_dtype(self, folders: Any) -> None:
        model = open_model(folders("opt"), torch.float16, quantization_config=config(8))
        model.to("cpu", torch.bfloat16)
        assert {layer.weight.dtype for layer in quantized(model).values()} == {torch.bfloat16}
        given = inputs(model)
        assert torch.equal(logits(model, given), logits(make_dense(model), given))

    @pytest.mark.parametrize("source", ["from_pretrained", "quantize_model"])
    @pytest.mark.parametrize(
        ("cast", "dtype"),
        [
            (lambda model: model.to(dtype=torch.float32), torch.float32),
            (lambda model: model.to(torch.float32), torch.float32),
            (lambda model: model.to(device="cpu", dtype=torch.float16), torch.float16),
            (lambda model: model.half(), torch.float16),
            (lambda model: model.float(), torch.float32),
        ],
        ids=["dtype keyword", "dtype", "device and dtype", "half", "float"],
    )
    def test_casts_as_any_module(
        self, cast: Callable[[nn.Module], nn.Module], dtype: torch.dtype, source: str, folders: Any
    ) -> None:
        if source == "from_pretrained" and not REPAIRED:
            pytest.skip("transformers 4.56 is left as it is")
        settings = config(8) if source == "from_pretrained" else None
        model = open_model(folders("llama"), torch.bfloat16, quantization_config=settings)
        if source == "quantize_model":
            from hqq.models.quantize import quantize_model

            quantize_model(model, QuantConfig(nbits=8, group_size=32), progress=False)
        assert cast(model) is model
        assert {layer.compute_dtype for layer in quantized(model).values()} == {dtype}
        given = inputs(model)
        assert torch.equal(logits(model, given), logits(make_dense(model), given))


class TestLoad:
    """load a pre-quantised checkpoint"""

    @pytest.mark.parametrize("name", DENSE_MODELS)
    def test_saved_and_loaded_bit_for_bit(self, name: str, folders: Any, tmp_path: Path) -> None:
        if name == "whisper" and not REPAIRED:
            pytest.skip("transformers 4.56 does not know the name of its head")
        model = open_model(folders(name), quantization_config=config())
        given = inputs(model)
        expected = logits(model, given)
        for turn in ("first", "second"):
            model.save_pretrained(tmp_path / turn)
            model = open_model(tmp_path / turn)
            assert_same(model, given, expected)
        assert_same(load_quantized(tmp_path / "second"), given, expected)

    def test_in_shards(self, folders: Any, tmp_path: Path) -> None:
        model = open_model(folders("opt"), quantization_config=config())
        given = inputs(model)
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
        assert torch.equal(logits(open_model(tmp_path), given), logits(model, given))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_written_by_4_56_2(self, dtype: torch.dtype) -> None:
        model = open_model(GOLDEN / "hf_safetensors", dtype)
        expected = torch.load(GOLDEN / "expected.pt", weights_only=True)
        layers = quantized(model)
        assert len(layers) == 14
        assert {layer.compute_dtype for layer in layers.values()} == {dtype}
        found = logits(model, {"input_ids": expected["ids"]}).float()
        # The logits were computed in bfloat16: this many roundings of its epsilon follow one another in two blocks.
        roundings, epsilon = 16, torch.finfo(torch.bfloat16).eps
        assert float((found - expected["hf_logits"]).abs().max()) <= roundings * epsilon * float(
            found.abs().max()
        )

    def test_dtype_of_the_checkpoint_by_default(self) -> None:
        if VERSION < (5, 0):
            pytest.skip("transformers 4 loads in float32 by default")
        model = open_model(GOLDEN / "hf_safetensors", None)
        assert model.dtype == torch.bfloat16
        assert {layer.compute_dtype for layer in quantized(model).values()} == {torch.bfloat16}

    @pytest.mark.parametrize(
        ("name", "quant_zero"),
        [("qwen2", False), ("qwen2", True), ("qwen2-vl", False), ("falcon", False), ("mamba", False)],
    )
    def test_written_by_the_library(self, name: str, quant_zero: bool, folders: Any, tmp_path: Path) -> None:
        if (quant_zero or name in NEED_REPAIR) and not REPAIRED:
            pytest.skip("transformers 4.56 is as it was")
        if name == "mamba" and not FUSED:
            pytest.skip(
                "transformers 4 has other parameters of Mamba in float32 with a quantiser than without"
            )
        from hqq.engine.hf import AutoHQQHFModel
        from hqq.models.checkpoint import save_quantized
        from hqq.models.quantize import quantize_model

        model = open_model(folders(name))
        settings = BaseQuantizeConfig(nbits=4, group_size=32, quant_zero=quant_zero, quant_scale=quant_zero)
        quantize_model(model, settings, progress=False)
        assert (
            quantized(model).keys()
            == quantized(open_model(folders(name), quantization_config=config())).keys()
        )
        given = inputs(model)
        expected = logits(model, given)
        save_quantized(model, tmp_path / "library")
        AutoHQQHFModel.save_to_safetensors(model, str(tmp_path / "engine"), verbose=False)
        model.save_pretrained(tmp_path / "transformers")
        for folder in ("library", "engine", "transformers"):
            assert_same(open_model(tmp_path / folder), given, expected)
            assert_same(load_quantized(tmp_path / folder), given, expected)

    @pytest.mark.skipif(not REPAIRED, reason="transformers 4.56 is as it was")
    @pytest.mark.parametrize("name", ["llama", "llama-tied"])
    def test_quantised_head_and_embeddings(self, name: str, folders: Any, tmp_path: Path) -> None:
        from hqq.models.checkpoint import save_quantized
        from hqq.models.quantize import quantize_model

        model = open_model(folders(name))
        settings = BaseQuantizeConfig(nbits=8, group_size=64)
        quantize_model(model, settings, lm_head=True, embeddings=True, progress=False)
        given = inputs(model)
        expected = logits(model, given)
        save_quantized(model, tmp_path / "library")
        model.save_pretrained(tmp_path / "transformers")
        for folder in ("library", "transformers"):
            loaded = open_model(tmp_path / folder)
            assert isinstance(loaded.lm_head, HQQLinear)
            assert torch.equal(logits(loaded, given), expected)

    def test_a_base_model_reads_the_checkpoint_of_one_with_a_head(self, folders: Any, tmp_path: Path) -> None:
        model = open_model(folders("llama"), quantization_config=config())
        model.save_pretrained(tmp_path)
        base = transformers.LlamaModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
        ids = inputs(model)["input_ids"]
        with torch.no_grad():
            assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)

    @pytest.mark.skipif(not REPAIRED, reason="transformers 4.56 is as it was")
    def test_a_new_head_may_be_new(self, folders: Any, tmp_path: Path) -> None:
        open_model(folders("llama"), quantization_config=config()).save_pretrained(tmp_path)
        model = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert isinstance(model.score, nn.Linear)
        assert bool(torch.isfinite(model.score.weight).all())
        assert len(quantized(model)) == 14


class TestDynamic:
    """dynamic_config naming some layers"""

    DYNAMIC = {  # noqa: RUF012
        "self_attn.q_proj": {"nbits": 4, "group_size": 64},
        "self_attn.v_proj": {"nbits": 8, "group_size": 32},
        "mlp.up_proj": {"nbits": 3, "group_size": 32, "axis": 0},
    }

    def test_each_layer_as_named_and_the_others_full(self, folders: Any, tmp_path: Path) -> None:
        settings = HqqConfig(dynamic_config=self.DYNAMIC)
        model = open_model(folders("llama"), quantization_config=settings)
        given = inputs(model)
        expected = logits(model, given)
        model.save_pretrained(tmp_path)
        for found in (model, open_model(tmp_path)):
            layers = {name: layer.qtensor().spec for name, layer in quantized(found).items()}
            assert len(layers) == 6
            for name, spec in layers.items():
                wanted = next(value for tag, value in self.DYNAMIC.items() if name.endswith(tag))
                assert (spec.nbits, spec.group_size, spec.axis) == (
                    wanted["nbits"],
                    wanted["group_size"],
                    wanted.get("axis", 1),
                )
            assert isinstance(found.model.layers[0].mlp.down_proj, nn.Linear)
            assert torch.equal(logits(found, given), expected)

    def test_with_skip_modules(self, folders: Any) -> None:
        settings = HqqConfig(dynamic_config=self.DYNAMIC, skip_modules=["lm_head", "mlp.up_proj"])
        model = open_model(folders("llama"), quantization_config=settings)
        assert {name.rpartition(".")[2] for name in quantized(model)} == {"q_proj", "v_proj"}

    @pytest.mark.skipif(not REPAIRED, reason="transformers 4.56 is as it was")
    def test_tags_of_no_layer_are_refused(self, folders: Any) -> None:
        settings = HqqConfig(dynamic_config={"attention.query": {"nbits": 4, "group_size": 64}})
        with pytest.raises(ValueError, match=r"attention\.query.*self_attn\.q_proj"):
            open_model(folders("llama"), quantization_config=settings)


class TestCache:
    """quantised KV cache"""

    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
    def test_generate(self, nbits: int, axis: int, folders: Any) -> None:
        model = open_model(folders("llama"))
        ids = inputs(model)["input_ids"]
        settings = {
            "backend": "hqq",
            "nbits": nbits,
            "axis_key": axis,
            "axis_value": axis,
            "q_group_size": 32,
        }
        settings["residual_length"] = 4
        tokens = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12, do_sample=False,
            cache_implementation="quantized", cache_config=settings,
        )  # fmt: skip
        assert tokens.shape == (2, 21)

    @pytest.mark.parametrize("head_size", [16, 80, 33, 127])
    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
    def test_keys_come_back_within_a_step(self, nbits: int, axis: int, head_size: int) -> None:
        layer = self.layer(nbits, axis, residual_length=1)
        keys = torch.randn(1, 2, 5, head_size)
        layer.update(keys, keys.clone())
        more = torch.randn(1, 2, 1, head_size)
        found, _ = layer.update(more, more.clone())
        assert found.shape == (1, 2, 6, head_size)
        _, meta = layer._quantized_keys
        # Rounding to nearest: half a step of the largest group, and the step of the second rounding after the flush.
        step = float(keys.max() - keys.min()) / (2**nbits - 1)
        assert float((found[:, :, :5] - keys).abs().max()) <= step * (1 + 1e-5)
        assert torch.equal(found[:, :, 5:], more)
        assert meta["axis"] == axis

    def test_flush_runs_no_solver_unless_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from hqq.core import quantizer

        calls: list[int] = []
        solver = quantizer.get_solver(None)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return solver(*args, **kwargs)

        monkeypatch.setattr(quantizer, "get_solver", lambda name: counted)
        keys = torch.randn(1, 2, 32, 64)
        self.layer(4, 0).update(keys, keys)
        assert calls == []
        monkeypatch.setattr(quantizer.Quantizer, "optimize_caches", True)
        self.layer(4, 0).update(keys, keys)
        assert calls == [1, 1]

    @staticmethod
    def layer(nbits: int, axis: int, residual_length: int = 8) -> Any:
        layer_class = getattr(transformers.cache_utils, "HQQQuantizedLayer")  # noqa: B009
        return layer_class(
            nbits=nbits, axis_key=axis, axis_value=axis, q_group_size=64, residual_length=residual_length
        )


class TestPeft:
    """PEFT LoRA train, merge, save"""

    # PEFT asks transformers for a name that is being retired.
    @pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_train_save_load_merge(self, dtype: torch.dtype, folders: Any, tmp_path: Path) -> None:
        peft = pytest.importorskip("peft")
        base = open_model(folders("llama"), dtype, quantization_config=config(8))
        codes = {name: layer.W_q.clone() for name, layer in quantized(base).items()}
        given = inputs(base)
        model = peft.get_peft_model(
            base, peft.LoraConfig(target_modules=["q_proj", "down_proj"], lora_alpha=32)
        )
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        losses = []
        for _ in range(12):
            loss = model(**given, labels=given["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
        assert all(torch.equal(layer.W_q, codes[n.replace("base_model.model.", "").replace(".base_layer", "")])
                   for n, layer in quantized(model).items())  # fmt: skip
        model.eval()
        expected = logits(model, given)
        model.save_pretrained(tmp_path)
        again = open_model(folders("llama"), dtype, quantization_config=config(8))
        assert torch.equal(logits(peft.PeftModel.from_pretrained(again, tmp_path), given), expected)
        name = "layers.0.self_attn.q_proj"
        wrapped = next(m for n, m in model.named_modules() if n.endswith(name))
        W = wrapped.base_layer.dequantize().float() + wrapped.get_delta_weight("default").detach().float()
        merged = model.merge_and_unload()
        assert len(quantized(merged)) == len(codes)
        found = next(layer for n, layer in quantized(merged).items() if n.endswith(name))
        # The sum is quantised anew: no group of 32 is off by more, in the sum of squares, than half a step of the
        # widest group in each, and a weight by no more than all of that; and the roundings of the dtype.
        step = (
            float(W.reshape(-1, 32).aminmax(dim=1).max.sub(W.reshape(-1, 32).aminmax(dim=1).min).max()) / 255
        )
        slack = 4 * torch.finfo(dtype).eps * float(W.abs().max())
        assert float((found.dequantize().float() - W).abs().max()) <= 32**0.5 / 2 * step + slack


class TestExperts:
    """mixtures of experts"""

    @pytest.mark.parametrize("name", MIXTURES)
    def test_experts_are_quantised_run_saved_and_loaded(
        self, name: str, folders: Any, tmp_path: Path
    ) -> None:
        if name == "gpt-oss" and not REPAIRED:
            pytest.skip("transformers 4.56 is as it was")
        model = open_model(folders(name), quantization_config=config(8))
        check_codes(model, folders(name), torch.bfloat16)
        if REPAIRED:
            fused = [n for n, p in open_model(folders(name)).named_parameters() if p.ndim == 3]
            assert sorted(experts(model)) == sorted(fused)
            assert bool(fused) == (FUSED or name == "gpt-oss")
            dense = open_model(folders(name))
            total = sum(p.numel() for p in dense.parameters())
            codes = sum(full_weight(dense, n).numel() for n in [*quantized(model), *experts(model)])
            assert model.hqq_summary.parameters == total
            assert model.hqq_summary.quantized == codes
            # 8 bits and, for each group of 32, a scale and a zero in 16 bits; the rest as it was.
            rest = 8 * sum(p.nbytes for p in dense.parameters()) - 16 * codes
            assert model.hqq_summary.bits == pytest.approx((9 * codes + rest) / total, rel=1e-6)
        given = inputs(model)
        expected = logits(model, given)
        for turn in ("first", "second"):
            model.save_pretrained(tmp_path / turn, max_shard_size="200KB")
            model = open_model(tmp_path / turn)
            assert torch.equal(logits(model, given), expected)
        assert torch.equal(expected, logits(make_dense(model), given))

    @staticmethod
    @torch.no_grad()
    def decided(model: Any) -> dict[str, torch.Tensor]:
        """Inputs whose tokens choose two experts by more than rounding: sums in another order choose the same."""
        while True:
            given = inputs(model)
            scores = torch.cat(model(**given, output_router_logits=True).router_logits)
            second, third = scores.topk(3).values[:, 1:].unbind(-1)
            if float((second - third).min()) > 2.0**-12 * float(scores.abs().max()):
                return given

    @pytest.mark.skipif(not FUSED, reason="experts are linear layers before transformers 5")
    @pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
    def test_every_implementation_computes_the_same(self, implementation: str, folders: Any) -> None:
        model = open_model(folders("mixtral"), torch.float32, quantization_config=config(4))
        given = self.decided(model)
        expected = logits(model, given)
        model.set_experts_implementation(implementation)
        found = logits(model, given)
        # The same products summed in another order: inner dimensions of at most 128, some ten matrices in a row.
        tolerance = 10 * 128 * torch.finfo(torch.float32).eps * float(expected.abs().max())
        assert float((found - expected).abs().max()) <= tolerance

    @pytest.mark.skipif(not FUSED, reason="experts are linear layers before transformers 5")
    def test_some_expert_weights_only(self, folders: Any, tmp_path: Path) -> None:
        settings = HqqConfig(dynamic_config={"mlp.experts.down_proj": {"nbits": 3, "group_size": 64}})
        model = open_model(folders("mixtral"), quantization_config=settings)
        assert {name.rpartition(".")[2] for name in experts(model)} == {"down_proj"}
        given = inputs(model)
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(open_model(tmp_path), given), logits(model, given))

    @pytest.mark.parametrize("name", MIXTURES)
    @pytest.mark.parametrize("kind", ["safetensors", "pt"])
    def test_quantised_by_the_library(self, name: str, kind: str, folders: Any, tmp_path: Path) -> None:
        from hqq.models.checkpoint import load_quantized, save_quantized
        from hqq.models.quantize import quantize_model

        model = open_model(folders(name))
        weights = sum(p.numel() for p in model.parameters())
        skipped = ["*.layers.1.*.experts.down_proj", "*.layers.1.*.experts.*.down_proj"]
        report = quantize_model(
            model, BaseQuantizeConfig(nbits=3, group_size=32), skip=("lm_head", *skipped), progress=False
        )
        assert report.weights == weights
        assert {row.name for row in report.layers} == {*quantized(model), *experts(model)}
        given = inputs(model)
        expected = logits(model, given)
        save_quantized(model, tmp_path / "library", format=kind)
        assert torch.equal(logits(load_quantized(tmp_path / "library"), given), expected)
        model.save_pretrained(tmp_path / "transformers")
        if REPAIRED:
            assert torch.equal(logits(open_model(tmp_path / "transformers"), given), expected)
            assert torch.equal(logits(load_quantized(tmp_path / "transformers"), given), expected)
        if REPAIRED and kind == "safetensors":
            assert torch.equal(logits(open_model(tmp_path / "library"), given), expected)
        assert torch.equal(expected, logits(make_dense(model), given))

    @pytest.mark.skipif(not REPAIRED, reason="transformers 4.56 is as it was")
    def test_much_left_out_is_said(self, folders: Any, caplog: pytest.LogCaptureFixture) -> None:
        only = {"self_attn.q_proj": {"nbits": 4, "group_size": 64}}
        with caplog.at_level("INFO", logger="hqq"):
            open_model(folders("mixtral"), quantization_config=HqqConfig(dynamic_config=only))
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "stay unquantised" in caplog.text


@pytest.mark.skipif(not REPAIRED, reason="transformers 4.56 is as it was")
class TestBadInput:
    """damaged and unsuitable checkpoints raise"""

    @pytest.fixture
    def saved(self, folders: Any, tmp_path: Path) -> Path:
        open_model(folders("opt"), quantization_config=config()).save_pretrained(tmp_path / "q")
        return tmp_path / "q"

    def change(self, folder: Path, change: Any) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    @pytest.mark.parametrize("gone", ["", "W_q", "scale", "nbits", "bias"])
    def test_missing(self, gone: str, saved: Path) -> None:
        layer = "model.decoder.layers.1.fc1."

        def change(tensors: dict[str, torch.Tensor]) -> None:
            for key in [
                key for key in tensors if key == layer + gone or (not gone and key.startswith(layer))
            ]:
                del tensors[key]

        self.change(saved, change)
        with pytest.raises(HQQError, match=r"layers\.1\.fc1"):
            open_model(saved)

    @pytest.mark.parametrize("ignore", [False, True])
    def test_wrong_shape(self, ignore: bool, saved: Path) -> None:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            layer = "model.decoder.layers.1.fc1."
            for key in [key for key in tensors if key.startswith(layer) and not key.endswith("bias")]:
                tensors[key] = tensors[key.replace("fc1", "fc2")].clone()

        self.change(saved, change)
        with pytest.raises(HQQError, match=r"layers\.1\.fc1.*\(64, 128\)"):
            open_model(saved, ignore_mismatched_sizes=ignore)

    def test_codes_without_a_configuration(self, saved: Path) -> None:
        described = json.loads((saved / "config.json").read_text())
        del described["quantization_config"]
        (saved / "config.json").write_text(json.dumps(described))
        with pytest.raises(HQQError, match="quantization_config"):
            open_model(saved, quantization_config=config())

    def test_group_size_that_does_not_divide(self, folders: Any) -> None:
        with pytest.raises(HQQError, match=r"group_size=48.*use one of"):
            open_model(folders("llama"), quantization_config=config(4, 48))

    @pytest.mark.skipif(not FUSED, reason="experts are linear layers before transformers 5")
    def test_experts_on_the_cpu_beside_gpus(self, folders: Any) -> None:
        from hqq.integrations.transformers.quantizer import refuse_offloaded_experts

        model = open_model(folders("mixtral"), quantization_config=config())
        for device_map in (None, "auto", {"": "cpu"}, {"model": "cpu", "lm_head": torch.device("cpu")}):
            refuse_offloaded_experts(model, device_map)
        for place in (0, "cuda:0", torch.device("cuda", 1)):
            with pytest.raises(HQQError, match=r"layers\.0.*experts\.\w+_proj on the CPU"):
                refuse_offloaded_experts(model, {"model.layers.0": "cpu", "model.layers.1": place})

    def test_experts_of_another_number(self, folders: Any, tmp_path: Path) -> None:
        if not FUSED:
            pytest.skip("experts are linear layers before transformers 5")
        open_model(folders("mixtral"), quantization_config=config()).save_pretrained(tmp_path)

        def change(tensors: dict[str, torch.Tensor]) -> None:
            for key in [key for key in tensors if key.endswith("experts.down_proj.W_q")]:
                tensors[key] = tensors[key][:3].clone()

        self.change(tmp_path, change)
        with pytest.raises(HQQError, match=r"experts\.down_proj"):
            open_model(tmp_path)


class TestInstall:
    """the repair installs itself, in any import order"""

    ORDERS = (
        "import hqq; import transformers",
        "import transformers; import hqq.core.quantize",
        "from hqq.core.quantize import HQQLinear; from transformers import AutoModelForCausalLM",
        "from transformers.quantizers import quantizer_hqq",
        "import transformers.cache_utils; import hqq.integrations.transformers",
    )

    @pytest.mark.parametrize("order", ORDERS)
    def test_any_import_order(self, order: str) -> None:
        code = (
            f"{order}\n"
            "import torch; from transformers import HqqConfig, AutoModelForCausalLM\n"
            f"model = AutoModelForCausalLM.from_pretrained({str(GOLDEN / 'original')!r}, "
            "quantization_config=HqqConfig(nbits=4, group_size=32), dtype=torch.bfloat16)\n"
            "print(type(model.model.layers[0].mlp.up_proj).__name__)\n"
            f"model = AutoModelForCausalLM.from_pretrained({str(GOLDEN / 'hf_safetensors')!r}, dtype=torch.bfloat16)\n"
            "print(type(model.model.layers[0].mlp.up_proj).__name__)\n"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert run.stdout.split() == ["HQQLinear", "HQQLinear"], run.stderr

    def test_what_this_version_needs(self) -> None:
        expected = "nothing" if not REPAIRED else "loader" if FUSED else "dtype"
        assert support().need == expected

    def run(self, code: str) -> str:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        return done.stdout.strip() + done.stderr.strip()

    @pytest.mark.skipif(not FUSED, reason="what a later transformers might look like")
    def test_steps_aside_where_transformers_does_it_itself(self) -> None:
        found = self.run(
            "from transformers.quantizers.quantizer_hqq import HqqHfQuantizer\n"
            "own = HqqHfQuantizer.get_quantize_ops = lambda self: None\n"
            "before = dict(vars(HqqHfQuantizer))\n"
            "from hqq.integrations.transformers import install\n"
            "print(install().need, all(vars(HqqHfQuantizer)[k] is v for k, v in before.items()))"
        )
        assert found == "nothing True"

    @pytest.mark.skipif(not FUSED, reason="what other versions of transformers might look like")
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (
                "del transformers.core_model_loading.WeightTransform.rename_source_key",
                "a way unknown to this hqq",
            ),
            ("Quantizer.create_quantized_param = Quantizer.check_quantized_param = None", "is too old"),
        ],
        ids=["new", "old"],
    )
    def test_says_so_where_there_is_no_way(self, change: str, said: str) -> None:
        found = self.run(
            "import transformers.core_model_loading\n"
            "from transformers.quantizers.quantizer_hqq import HqqHfQuantizer as Quantizer\n"
            f"{change}\n"
            "from transformers import AutoModelForCausalLM\n"
            f"AutoModelForCausalLM.from_pretrained({str(GOLDEN / 'hf_safetensors')!r})"
        )
        last = found.splitlines()[-1]
        assert last.startswith(f"hqq.errors.BackendError: transformers {transformers.__version__} ")
        assert said in last
        assert "install transformers" in last

    def test_importing_hqq_leaves_transformers_alone(self) -> None:
        code = (
            "import sys, hqq.core.quantize as q; q.BaseQuantizeConfig(); print('transformers' in sys.modules)"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert run.stdout.strip() == "False"
