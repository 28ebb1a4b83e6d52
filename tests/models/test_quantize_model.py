"""quantize_model on every kind of model: which layers change, to what, and what the report says."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from hqq import HQQEmbedding, HQQLinear, QuantConfig, quantize_model
from hqq.core.modules import named_sites
from tests.models.zoo import ARCHITECTURES, ConvNet, build, run

CONFIG = QuantConfig(nbits=4, group_size=16)


def dequantized_copy(model: nn.Module, quantized: nn.Module, config: QuantConfig) -> nn.Module:
    """Return `model` with the weights of those layers that `quantized` quantised replaced by what each, taken alone,
    dequantises to."""
    twin = copy.deepcopy(model)
    chosen = {names for module, names in named_sites(quantized).items() if isinstance(module, HQQLinear)}
    for module, names in named_sites(twin).items():
        if names in chosen:
            alone = HQQLinear(
                copy.deepcopy(module), config.to_dict(), compute_dtype=module.weight.dtype, device="cpu"
            )
            module.weight = nn.Parameter(alone.dequantize())
    return twin


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_model_computes_with_the_dequantised_weights(name: str, rng: torch.Generator) -> None:
    model, inputs = build(name, rng)
    quantized = copy.deepcopy(model)
    report = quantize_model(quantized, CONFIG)
    assert len(report.layers) >= 8
    # The same matrices through the same operations: equal to the last bit.
    assert torch.equal(run(quantized, inputs), run(dequantized_copy(model, quantized, CONFIG), inputs))
    assert not torch.equal(run(quantized, inputs), run(model, inputs))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_report_accounts_for_every_weight(name: str, rng: torch.Generator) -> None:
    model, _ = build(name, rng)
    matrices = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False) if p.ndim >= 2}
    count = sum(p.numel() for p in model.parameters())
    report = quantize_model(model, CONFIG, errors=True)
    assert report.weights == count
    mentioned = {row.name for row in report.layers} | {row.name for row in report.left}
    owners = {key.rpartition(".")[0] for key in matrices}
    assert owners <= mentioned | {names[-1] for names in named_sites(model).values()}
    for row in report.layers:
        assert row.shape == matrices[f"{row.name}.weight"]
        N, K = row.shape
        bias = getattr(model.get_submodule(row.name), "bias", None)
        # 4 bits per code, scale and zero in float32 per group of 16, the bias.
        assert row.bytes == N * K // 2 + 2 * 4 * N * K // 16 + (0 if bias is None else 4 * N)
        assert row.error is not None and 0 < row.error < 0.2
    assert all(row.reason for row in report.left)
    floats = sum(p.nbytes for p in model.parameters() if p.dtype.is_floating_point)
    stats = sum(m.scale.nbytes + m.zero.nbytes for m in model.modules() if isinstance(m, HQQLinear))
    codes = sum(m.W_q.nbytes for m in model.modules() if isinstance(m, HQQLinear))
    assert report.bytes == floats + stats + codes
    assert math.isclose(report.effective_bits, 8 * report.bytes / count)


def test_what_the_ecosystem_reads(rng: torch.Generator) -> None:
    model, _ = build("llama", rng)
    quantize_model(model, CONFIG)
    assert model.hqq_quantized is True
    assert model.linear_tags[:2] == ["self_attn.q_proj", "self_attn.k_proj"]
    assert "lm_head" not in model.linear_tags
    assert model.model.layers[1].mlp.down_proj.name == "model.layers.1.mlp.down_proj"
    described = model.config.quantization_config
    assert described["quant_method"] == "hqq"
    assert described["skip_modules"] == ["lm_head"]
    weight = described["quant_config"]["weight_quant_params"]
    assert (weight["nbits"], weight["group_size"], weight["axis"]) == (4, 16, 1)
    assert isinstance(weight["solver"], str)


def test_a_stack_of_linear_layers_and_a_convolutional_net(rng: torch.Generator) -> None:
    stack = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    report = quantize_model(stack, CONFIG)
    assert [row.name for row in report.layers] == ["0", "2"]
    net = ConvNet().eval()
    images = torch.randn(2, 3, 8, 8, generator=rng)
    exact = net(images).detach()
    report = quantize_model(net, QuantConfig(nbits=8, group_size=8))
    assert [row.name for row in report.layers] == ["head.0", "head.2"]
    assert [(row.name, row.kind) for row in report.left] == [("stem.0", "Conv2d")]
    # 8 bits: half a step of 1/255 of a group's range, over two layers with inputs of unit size.
    assert (net(images) - exact).norm() < 0.02 * exact.norm()


def test_a_layer_with_two_names_is_quantised_once() -> None:
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(32, 32))})
    report = quantize_model(model, CONFIG)
    assert [row.name for row in report.layers] == ["a", "b.1"]
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], HQQLinear)


def test_two_layers_over_one_weight_share_the_codes_and_keep_their_biases() -> None:
    one, other = nn.Linear(32, 32), nn.Linear(32, 32)
    other.weight = one.weight
    model = nn.Sequential(one, other)
    biases = one.bias.detach().clone(), other.bias.detach().clone()
    report = quantize_model(model, CONFIG)
    assert model[0].W_q is model[1].W_q
    assert model[0].scale.data_ptr() == model[1].scale.data_ptr()
    assert all(torch.equal(layer.bias, bias) for layer, bias in zip(model, biases, strict=True))
    assert report.layers[1].shared_with == "0" and report.layers[1].bytes == 0
    x = torch.randn(2, 32)
    assert torch.equal(model[1](x), nn.functional.linear(x, model[0].dequantize(), biases[1]))


@pytest.mark.parametrize("flag", ["lm_head", "embeddings"])
@pytest.mark.parametrize("name", ["tied_llama", "opt", "t5"])
def test_tied_head_and_embedding_share_codes_when_asked(name: str, flag: str, rng: torch.Generator) -> None:
    model, inputs = build(name, rng)
    plain = copy.deepcopy(model)
    report = quantize_model(plain, CONFIG)
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert any(row.name == "lm_head" and "tied" in row.reason for row in report.left)
    quantize_model(model, CONFIG, **{flag: True})
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, HQQLinear) and isinstance(table, HQQEmbedding)
    assert head.W_q is table.W_q
    ids = inputs["input_ids"]
    assert torch.equal(table(ids), head.dequantize()[ids])
    assert run(model, inputs).isfinite().all()


def test_untied_head_and_embedding(rng: torch.Generator) -> None:
    model, _ = build("llama", rng)
    both, head_only = copy.deepcopy(model), copy.deepcopy(model)
    quantize_model(head_only, CONFIG, lm_head=True)
    assert isinstance(head_only.lm_head, HQQLinear) and isinstance(head_only.model.embed_tokens, nn.Embedding)
    table = model.model.embed_tokens.weight.detach()
    report = quantize_model(both, CONFIG, embeddings=True, errors=True)
    assert isinstance(both.lm_head, nn.Linear) and isinstance(both.model.embed_tokens, HQQEmbedding)
    row = next(row for row in report.layers if row.kind == "embedding")
    got = both.model.embed_tokens(torch.arange(96))
    assert row.error == pytest.approx(float((got - table).norm() / table.norm()), rel=1e-5)


def test_layers_that_cannot_be_replaced_are_left_with_a_reason(rng: torch.Generator) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
    model = nn.ModuleList([nn.Linear(32, 32), Scaled(32, 32), normed, nn.MultiheadAttention(32, 2)])
    x = torch.randn(3, 32, generator=rng)
    exact = [model[i](x).detach() for i in (1, 2)] + [model[3](x, x, x)[0].detach()]
    report = quantize_model(model, CONFIG)
    assert [row.name for row in report.layers] == ["0"]
    reasons = {row.name: row.reason for row in report.left}
    assert (
        "forward" in reasons["1"]
        and "computed" in reasons["2"]
        and "MultiheadAttention" in reasons["3.out_proj"]
    )
    after = [model[i](x) for i in (1, 2)] + [model[3](x, x, x)[0]]
    assert all(torch.equal(a, b) for a, b in zip(exact, after, strict=True))


def test_gpt2_says_why_nothing_can_be_done(rng: torch.Generator) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from hqq.errors import ConfigError

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96))
    with pytest.raises(ConfigError, match="Conv1D"):
        quantize_model(model, CONFIG)


def test_the_fused_path_of_torch_encoder_layers_is_not_taken(rng: torch.Generator) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 32, generator=rng)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    twin = copy.deepcopy(encoder)
    quantize_model(encoder, CONFIG)
    twin = dequantized_copy(twin, encoder, CONFIG)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        expected = twin(x, src_key_padding_mask=mask).detach()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    with torch.inference_mode():
        assert torch.equal(encoder(x, src_key_padding_mask=mask), expected)


def test_compute_dtype_casts_the_whole_model_but_not_its_constants(rng: torch.Generator) -> None:
    model, inputs = build("llama", rng)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    quantize_model(model, CONFIG, compute_dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.uint8}
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert run(model, inputs).dtype == torch.bfloat16
    net = ConvNet().eval()
    quantize_model(net, CONFIG.__class__(nbits=8, group_size=8), compute_dtype=torch.float64)
    assert net.stem[1].running_mean.dtype == torch.float64 and net.gain.dtype == torch.float32


def test_layers_keep_their_own_dtype_and_mode() -> None:
    model = nn.Sequential(nn.Linear(32, 32).bfloat16(), nn.Linear(32, 32)).train()
    model[1].eval()
    quantize_model(model, CONFIG)
    assert [layer.compute_dtype for layer in model] == [torch.bfloat16, torch.float32]
    assert [layer.training for layer in model] == [True, False]
