"""Tiny models of many architectures, with random weights, in folders of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from hqq.core.experts import HQQExperts
from hqq.core.linear import HQQLinear
from hqq.core.modules import replace_module

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])

_TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _text(name: str, **settings: Any) -> Callable[..., Any]:
    def build(layers: int = 2) -> Any:
        sizes = {**_TEXT, "num_hidden_layers": layers, **settings}
        config = getattr(transformers, f"{name}Config")(**sizes)
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return build


def _opt(layers: int = 2) -> Any:
    config = transformers.OPTConfig(
        vocab_size=128, hidden_size=64, ffn_dim=128, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)  # zeros would hide a bias that gets lost
    return model


def _t5(layers: int = 2) -> Any:
    config = transformers.T5Config(
        vocab_size=128,
        d_model=64,
        d_ff=128,
        d_kv=16,
        num_layers=layers,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def _whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=128, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=16,
        max_source_positions=16, max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def _llava(layers: int = 2) -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    text = transformers.LlamaConfig(**_TEXT, num_hidden_layers=layers)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=127)
    return transformers.LlavaForConditionalGeneration(config)


def _qwen2_vl(layers: int = 2) -> Any:
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    config = transformers.Qwen2VLConfig(
        text_config={**_TEXT, **rope, "num_hidden_layers": layers},
        vision_config={
            "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        image_token_id=127, video_token_id=126, vision_start_token_id=125, vision_end_token_id=124,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config)


def _gemma3_vl(layers: int = 2) -> Any:
    """Its image encoder initialises layers by name, and has one in nn.MultiheadAttention."""
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        vision_config=vision, text_config={**_TEXT, "head_dim": 16, "num_hidden_layers": layers},
        mm_tokens_per_image=4, image_token_id=127, image_token_index=127, boi_token_index=125, eoi_token_index=124,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


def _mamba(layers: int = 2) -> Any:
    """Multiplies by the weight of one of its layers instead of calling it."""
    config = transformers.MambaConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=layers, state_size=8, time_step_rank=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.MambaForCausalLM(config)


def _falcon(layers: int = 2) -> Any:
    """Linear layers of a class of its own."""
    config = transformers.FalconConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, bos_token_id=1, eos_token_id=2
    )  # fmt: skip
    return transformers.FalconForCausalLM(config)


_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

BUILDERS: dict[str, Callable[..., Any]] = {
    "llama": _text("Llama"),
    "llama-tied": _text("Llama", tie_word_embeddings=True),
    "qwen2": _text("Qwen2"),
    "opt": _opt,
    "t5": _t5,
    "whisper": _whisper,
    "llava": _llava,
    "qwen2-vl": _qwen2_vl,
    "gemma3-vl": _gemma3_vl,
    "mamba": _mamba,
    "falcon": _falcon,
    "gpt-neox": _text("GPTNeoX"),
    "mixtral": _text("Mixtral", num_local_experts=4),
    "qwen3-moe": _text("Qwen3Moe", head_dim=16, decoder_sparse_step=1, mlp_only_layers=[], **_MOE),
    "deepseek": _text(
        "DeepseekV3", num_key_value_heads=4, n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2,
        moe_intermediate_size=64, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=64, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=16, n_shared_experts=1,
    ),
    "gpt-oss": _text(
        "GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=16, max_position_embeddings=131072,
        layer_types=["full_attention", "sliding_attention"],
    ),
}  # fmt: skip

# transformers 4.56, which is left as it is, cannot quantise or load these.
NEED_REPAIR = ("gemma3-vl", "mamba")
MIXTURES = ("mixtral", "qwen3-moe", "deepseek", "gpt-oss")


def save(name: str, folder: Path, seed: int, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Save the model called `name`, with weights from `seed`, and return its folder."""
    torch.manual_seed(seed)
    BUILDERS[name](**options).to(dtype).save_pretrained(folder)
    return folder


def open_model(folder: Path, dtype: torch.dtype | None = torch.bfloat16, **options: Any) -> Any:
    """Return the model in `folder`, of the class that its configuration names."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, config.architectures[0])
    if dtype is not None:
        options["dtype"] = dtype
    return model_class.from_pretrained(folder, **options)


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """Return fresh inputs for `model`, where it takes them."""
    return {name: tensor.to(model.device) for name, tensor in _inputs(model).items()}


def _inputs(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 100, (2, 9))
    kind = model.config.model_type
    if kind == "whisper":
        return {"input_features": torch.randn(2, 16, 32, dtype=model.dtype), "decoder_input_ids": ids}
    if kind == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    if kind == "qwen2_vl":
        images = torch.tensor([125, *[127] * 4, 124]).repeat(2, 1)
        types = torch.cat([images == 127, torch.zeros_like(ids)], 1).int()
        taken = inspect.signature(model.forward).parameters
        return {
            "input_ids": torch.cat([images, ids], 1),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
            "pixel_values": torch.randn(32, 3 * 2 * 4 * 4, dtype=model.dtype),
            **({"mm_token_type_ids": types} if "mm_token_type_ids" in taken else {}),
        }
    if kind in ("llava", "gemma3"):
        pixels = torch.randn(2, 3, 16, 16, dtype=model.dtype)
        images = torch.full((2, 4), 127)
        types = {"token_type_ids": torch.cat([images == 127, torch.zeros_like(ids)], 1).int()}
        return {
            "input_ids": torch.cat([images, ids], 1),
            "pixel_values": pixels,
            **(types if kind == "gemma3" else {}),
        }
    return {"input_ids": ids}


@torch.no_grad()
def logits(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the model's logits."""
    result: torch.Tensor = model(**given).logits
    return result


def assert_same(model: Any, given: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
    """`model` computes `expected`, bit for bit.

    Mamba's do not: its products of single elements round by where its tensors happen to lie in memory.
    """
    found = logits(model, given)
    slack = 64 * torch.finfo(model.dtype).eps if model.config.model_type == "mamba" else 0.0
    difference = float((found - expected).abs().max())
    assert difference <= slack * float(expected.abs().max())


def quantized(model: nn.Module) -> dict[str, HQQLinear]:
    """Return the quantised linear layers of `model`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, HQQLinear)}


def experts(model: nn.Module) -> dict[str, HQQExperts]:
    """Return the quantised expert parameters of `model`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, HQQExperts)}


def make_dense(model: nn.Module) -> nn.Module:
    """Replace every quantised layer of `model` by a full one of the same values: what the model has to compute."""
    for name, layer in quantized(model).items():
        W = layer.dequantize()
        dense = nn.Linear(W.shape[1], W.shape[0], bias=layer.bias is not None, dtype=W.dtype)
        dense.weight = nn.Parameter(W)
        if layer.bias is not None:
            dense.bias = nn.Parameter(layer.bias.detach().clone())
        replace_module(model, [name], dense)
    for name, stacked in experts(model).items():
        owner = model.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        W = stacked.dequantize()
        del owner._modules[leaf]
        owner.register_parameter(leaf, nn.Parameter(W))
    return model


def full_weight(dense: nn.Module, name: str) -> torch.Tensor:
    """Return the parameter that the quantised layer called `name` was made from."""
    parameters = dict(dense.named_parameters())
    return parameters[name] if name in parameters else parameters[f"{name}.weight"]
