"""The fused decoding step gives the tokens that the model's own forward pass makes the likeliest, or draws."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
from hqq import QuantConfig, quantize_model  # noqa: E402
from hqq.errors import BackendError, ConfigError  # noqa: E402
from hqq.models.generate import HFGenerator  # noqa: E402
from tests.choices import check_texts  # noqa: E402
from tests.cli.tiny_lm import byte_tokenizer  # noqa: E402

PROMPTS = ["hello", "a prompt longer than the other one"]
SIZES: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama tied, many heads, scaled rope": (
        "Llama",
        {
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
    ),
    "mistral with a window": ("Mistral", {"sliding_window": 16}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 1}),
    "qwen2 with windows in some layers": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    ),
    "qwen3 with heads of their own size": ("Qwen3", {"head_dim": 24}),
}


def build(family: str, seed: int, device: torch.device, **changes: Any) -> Any:
    """Return a random model in float32."""
    torch.manual_seed(seed)
    name, settings = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **settings, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or parameter_name.endswith("bias"):
            parameter.data += torch.randn_like(parameter) / 4
    return model.to(device)


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


def texts(model: Any, tokenizer: Any, step: str, **options: Any) -> list[list[int]]:
    generator = HFGenerator(model, tokenizer, **{"max_new_tokens": 14, **options}, step=step)
    assert (generator.step_reason is None) == (step == "fused")
    result = generator.generate(PROMPTS, use_chat_template=False)
    return [tokens.tolist() for tokens in result["output_tokens"]]


@torch.no_grad()
def step_logits(model: Any, ids: torch.Tensor, mask: torch.Tensor, fused: bool) -> torch.Tensor:
    """Return the logits after token 7 behind prompts, by the fused step or by the model's own."""
    from hqq.models.generation.decoder import Decoder
    from hqq.models.generation.family import take_apart
    from hqq.models.generation.sampling import Sampling

    decoder = Decoder(model, len(ids), 64, ids.device, Sampling(), (), 0)
    if fused:
        decoder.fuse(take_apart(model))
    decoder.start(ids, mask)
    decoder.token.fill_(7)
    if decoder._fused is not None:
        return decoder._fused.logits(decoder.token)
    decoder.attention_mask.index_fill_(1, decoder.cache_position, 1)
    return decoder.model(decoder.token, decoder.attention_mask, decoder.position_ids, decoder.cache_position)


def check(generator: HFGenerator, prompts: list[str], texts: list[list[int]]) -> None:
    """Assert that the texts are of full length, and what the model's own passes over them choose."""
    assert [len(text) for text in texts] == [generator.max_new_tokens] * len(prompts)
    ids = [generator.tokenizer(prompt)["input_ids"] for prompt in prompts]
    check_texts(generator.model, ids, texts, generator.sampling, generator.seed)


def check_fused(model: Any, tokenizer: Any, prompts: list[str], **options: Any) -> None:
    """Assert that the fused step goes on after the prompts as the model's own passes do."""
    generator = HFGenerator(model, tokenizer, **{"max_new_tokens": 14, **options}, step="fused")
    assert generator.step_reason is None
    result = generator.generate(prompts, use_chat_template=False)
    check(generator, prompts, [tokens.tolist() for tokens in result["output_tokens"]])


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_greedy_tokens(family: str, seed: int, device: torch.device, tokenizer: Any) -> None:
    check_fused(build(family, seed, device), tokenizer, PROMPTS)


def test_quantised_and_several_calls(seed: int, device: torch.device, tokenizer: Any) -> None:
    model = build("llama", seed, device)
    quantize_model(model, QuantConfig(nbits=4, group_size=32), progress=False, lm_head=True)
    fused = HFGenerator(model, tokenizer, 6, step="fused")
    for prompts in (["hello"], PROMPTS, ["x" * 70]):
        got = fused.generate(prompts, use_chat_template=False)
        check(fused, prompts, [tokens.tolist() for tokens in got["output_tokens"]])
        assert got["output_text"] == [
            tokenizer.decode(t, skip_special_tokens=True) for t in got["output_tokens"]
        ]


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 3},
        {"do_sample": True, "temperature": 1.5, "top_k": None, "min_p": 0.01, "seed": 4},
        {"repetition_penalty": 1.4},
    ],
    ids=["top_p", "min_p", "repetition"],
)
def test_other_choices(options: dict[str, Any], seed: int, device: torch.device, tokenizer: Any) -> None:
    check_fused(build("llama", seed, device), tokenizer, PROMPTS, **options)


def test_end_tokens(seed: int, device: torch.device, tokenizer: Any) -> None:
    model = build("llama", seed, device)
    full = texts(model, tokenizer, "fused")
    end = full[0][5]
    cut = [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in full]
    assert texts(model, tokenizer, "fused", eos_token_id=[end, 257]) == [
        tokens[: tokens.index(257)] if 257 in tokens else tokens for tokens in cut
    ]


def test_reasons_for_the_models_own_step(
    seed: int, device: torch.device, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def reason(model: Any, **options: Any) -> str:
        with pytest.raises(BackendError, match=r"got step='fused', which cannot be") as caught:
            HFGenerator(model, tokenizer, 4, step="fused", **options)
        with caplog.at_level(logging.INFO, logger="hqq.models.generate"):
            caplog.clear()
            told = HFGenerator(model, tokenizer, 4, **options)
        if device.type == "cuda":
            assert told.step_reason in str(caught.value)
            assert told.step_reason in caplog.text
        else:
            assert told.step_reason == "the model is on cpu" or "compile" in str(told.step_reason)
        return str(caught.value)

    assert "compile='partial' was asked for" in reason(build("llama", seed, device), compile="partial")
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    assert "'dynamic', whose frequencies" in reason(build("llama", seed, device, rope_scaling=dynamic))
    assert "hidden_act='gelu'" in reason(build("llama", seed, device, hidden_act="gelu"))
    hooked = build("llama", seed, device)
    hooked.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 2)
    assert "model.layers.1.mlp" in reason(hooked)
    gpt = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=258, n_embd=32, n_layer=1, n_head=2)
    ).to(device)
    assert "GPT2LMHeadModel" in reason(gpt)
    mixed = build("llama", seed, device)
    mixed.model.layers[0].input_layernorm.half()
    assert "norms of torch.float16, torch.float32" in reason(mixed)


def test_a_step_that_there_is_not(seed: int, device: torch.device, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="got step='fast'; expected one of 'auto', 'fused', 'transformers'"):
        HFGenerator(build("llama", seed, device), tokenizer, step="fast")


@pytest.mark.parametrize("rows", [3, 6])
@pytest.mark.parametrize("axis", [1, 0])
def test_products_bring_norms_gates_and_sums_along(
    axis: int, rows: int, seed: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a product is one kernel with what stands around it, or, without a GPU, in the words of its reference."""
    from hqq.backends.native import NativeWeight
    from hqq.core.linear import HQQLinear
    from hqq.kernels import tiled_step
    from hqq.kernels.tiled_weight import tiled_support
    from hqq.models.generation import products

    dtype = torch.float16
    model = build("llama", seed, device, num_key_value_heads=2).to(dtype)
    quantize_model(
        model,
        QuantConfig(nbits=4, group_size=32, axis=axis),
        compute_dtype=dtype,
        device=device,
        progress=False,
        lm_head=True,
    )
    ids = torch.randint(0, 258, (rows, 9), device=device)
    mask = torch.ones_like(ids)
    expected = step_logits(model, ids, mask, fused=True).double()
    for layer in model.modules():
        # 258 outputs are in no groups down the outputs that kernels take: with axis=0 the head goes its own way.
        if isinstance(layer, HQQLinear) and tiled_support(layer.qtensor().spec, dtype) is None:
            q = layer.qtensor()
            layer.prepare("pytorch")
            layer.hold(NativeWeight(q, dtype))
    calls = []

    def step_linear(x: torch.Tensor, *args: Any, **around: Any) -> torch.Tensor:
        calls.append(tuple(name for name in ("norm", "gated", "residual") if around.get(name) is not None))
        return tiled_step.step_linear(x, *args, **around)

    monkeypatch.setattr(
        products, "takes", lambda weight, x, gated=False: x.shape[0] == rows and not (gated and axis == 0)
    )
    monkeypatch.setattr(products, "step_linear", step_linear)
    got = step_logits(model, ids, mask, fused=True).double()
    gate = [("norm", "gated") if axis == 1 else ("norm",)]
    if rows == 3:
        assert calls == [("norm",), ("residual",), *gate, ("residual",)] * 2 + [("norm",)] * axis
    else:  # a kernel for the norm costs less
        assert calls == [("residual",), *[("gated",)] * axis, ("residual",)] * 2
    assert (got - expected).abs().max() <= 16 * 2.0**-11 * expected.abs().max()


@pytest.mark.parametrize("tokens", [1, 64, 65, 128, 129, 511, 513, 1024, 1025, 2047])
def test_lengths_of_recorded_prompts(tokens: int) -> None:
    from hqq.models.generation.prompt_graphs import _rounded

    places = _rounded(tokens)
    assert tokens <= places <= tokens + max(63, tokens // 8) and _rounded(places) == places


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral with a window"])
@pytest.mark.parametrize("padded", [False, True])
def test_what_comes_behind_a_prompt_changes_nothing(
    padded: bool, family: str, seed: int, device: torch.device
) -> None:
    """Prompts may be filled up to the length of a recorded pass."""
    from hqq.models.generation.decoder import Decoder
    from hqq.models.generation.family import take_apart
    from hqq.models.generation.sampling import Sampling

    model = build(family, seed, device)
    ids = torch.randint(0, 258, (2, 30), device=device)
    mask = torch.ones(2, 21, dtype=torch.int64, device=device)
    mask[1, : 5 * padded] = 0
    logits = []
    for places in (21, 30):
        decoder = Decoder(model, 2, 64, device, Sampling(), (), 0)
        decoder.fuse(take_apart(model))
        fused = decoder._fused
        assert fused is not None
        fused.prompt(ids[:, :21], mask)
        last = torch.arange(2, device=device) * places + 20
        after_prompt = fused._pass(ids[:, :places].contiguous(), last, padded)
        logits.append((after_prompt.double(), fused.logits(ids[:, :1]).double()))
    for got, expected in zip(*logits, strict=True):
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "mistral with a window"])
@pytest.mark.parametrize("batch", [1, 2])
def test_prompts_are_graphs_when_their_length_comes_again(
    batch: int, family: str, seed: int, device: torch.device, tokenizer: Any
) -> None:
    generator = HFGenerator(build(family, seed, device), tokenizer, 8, cache_size=96)
    for length in (20, 64, 63, 40, 80, 65, 88, 5):
        prompts = [
            "".join(chr(97 + (i * i + row) % 26) for i in range(length - 3 * row)) for row in range(batch)
        ]
        got = generator.generate(prompts, use_chat_template=False)
        check(generator, prompts, [tokens.tolist() for tokens in got["output_tokens"]])
    decoder = generator._decoder
    assert decoder is not None and decoder._fused is not None
    fused = decoder._fused
    recorded = fused._prompts._recorded
    assert set(recorded) == {(64, batch > 1), (96, batch > 1)} and all(recorded.values())
    ids = torch.randint(0, 258, (batch, 70), device=device)
    fused.forget_prompts()
    with torch.no_grad():
        first, second, third = (fused.prompt(ids, torch.ones_like(ids)).clone() for _ in range(3))
    assert torch.equal(first, second) and torch.equal(first, third)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_step_is_one_graph(batch: int, seed: int, device: torch.device, tokenizer: Any) -> None:
    model = build("qwen3 with heads of their own size", seed, device)
    prompts = [f"{'x' * (i % 7)}{i} and on" for i in range(batch)]
    generator = HFGenerator(model, tokenizer, 24)
    assert generator.step_reason is None
    for _ in range(2):
        got = generator.generate(prompts, use_chat_template=False)
        assert generator._decoder is not None and generator._decoder._graph is not None
        check(generator, prompts, [tokens.tolist() for tokens in got["output_tokens"]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_joined_products_in_the_step(
    axis: int, dtype: torch.dtype, seed: int, device: torch.device, tokenizer: Any
) -> None:
    from hqq.backends.prepare import prepare_for_inference

    model = build("qwen2", seed, device, num_key_value_heads=2).to(dtype)
    quantize_model(model, QuantConfig(nbits=4, group_size=32, axis=axis), compute_dtype=dtype, progress=False)
    ids = torch.randint(0, 258, (3, 9), device=device)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = step_logits(model, ids, mask, fused=False).double()
    prepare_for_inference(model)
    got = step_logits(model, ids, mask, fused=True).double()
    # Two layers of products that round differently: some units of the largest logit.
    unit = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    assert (got - expected).abs().max() <= 16 * unit * expected.abs().max()
