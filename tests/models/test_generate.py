"""HFGenerator gives the tokens that the model's own forward pass makes the likeliest, whatever runs the steps."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hqq import QuantConfig, quantize_model
from hqq.errors import BackendError, ConfigError

transformers = pytest.importorskip("transformers")
from hqq.models.generate import (  # noqa: E402
    HFGenerator,
    patch_model_for_compiled_runtime,
    unpatch_model_for_compiled_runtime,
)
from hqq.models.generation.sampling import Sampling  # noqa: E402
from tests.choices import check_texts, rounding_slack  # noqa: E402
from tests.cli.tiny_lm import byte_tokenizer, tiny_llama  # noqa: E402

SHIPPED = Path(__file__).resolve().parents[2] / "examples" / "stdlib-llama"
PROMPTS = ["def read_lines(path):", "class Node:\n    def __init__(self, value", "import os\n"]
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} > {% endif %}"
)


@pytest.fixture(scope="module", params=["float32", "4bit"])
def shipped(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The shipped model, as it is and quantised, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    if request.param == "4bit":
        quantize_model(model, QuantConfig(nbits=4, group_size=64), progress=False)
    return model, transformers.AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


def endless(seed: int, **changes: Any) -> Any:
    """A quantised model that never ends a text."""
    model = tiny_llama(seed, **{"max_position_embeddings": 128, **changes})
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    quantize_model(model, QuantConfig(nbits=4, group_size=32), progress=False)
    return model


@pytest.fixture
def model(seed: int) -> Any:
    return endless(seed)


def reference(model: Any, tokenizer: Any, prompt: str, count: int, **options: Any) -> Tensor:
    """What the model's own generate gives for a prompt, without the prompt."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    options = {"do_sample": False, "pad_token_id": 1, **options}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options)
    return out[0, ids.shape[1] :]


def check(
    model: Any,
    tokenizer: Any,
    prompts: str | list[str],
    texts: Any,
    count: int,
    sampling: Sampling | None = None,
) -> None:
    """Assert that `texts` (one tensor for one prompt) have `count` tokens, and those that the model's passes choose."""
    prompts, texts = ([prompts], [texts]) if isinstance(prompts, str) else (prompts, texts)
    assert [len(text) for text in texts] == [count] * len(prompts)
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    check_texts(model, ids, [text.tolist() for text in texts], sampling)


def test_greedy_is_transformers_greedy(shipped: tuple[Any, Any]) -> None:
    """The tokens themselves, which roundings cannot change here: nowhere are two almost as likely."""
    model, tokenizer = shipped
    generator = HFGenerator(model, tokenizer, max_new_tokens=48)
    batch = generator.generate(PROMPTS, use_chat_template=False)
    for row, prompt in enumerate(PROMPTS):
        expected = reference(model, tokenizer, prompt, 48).tolist()
        assert smallest_lead(model, tokenizer(prompt)["input_ids"], expected) > 1
        expected = expected[: expected.index(0)] if 0 in expected else expected
        single = generator.generate(prompt, use_chat_template=False)
        assert single["output_tokens"].tolist() == expected
        assert single["input_tokens"].tolist() == tokenizer(prompt)["input_ids"]
        assert single["output_text"] == tokenizer.decode(expected, skip_special_tokens=True)
        assert {key: values[row] for key, values in batch.items() if "text" in key} == {
            "output_text": single["output_text"]
        }
        assert batch["output_tokens"][row].tolist() == expected
        assert "".join(generator.stream(prompt, use_chat_template=False)) == single["output_text"]
    streamed = list(generator.stream(PROMPTS, use_chat_template=False))
    assert ["".join(pieces) for pieces in zip(*streamed, strict=True)] == batch["output_text"]


@torch.no_grad()
def smallest_lead(model: Any, prompt: list[int], text: list[int]) -> float:
    """Of all the places of a text the least lead of the likeliest token over the next, in what rounding may take."""
    logits = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
    first, second = logits.topk(2).values.unbind(-1)
    return float((first - second).min()) / (2 * rounding_slack(logits, blocks=len(model.model.layers)))


@pytest.mark.parametrize("mode", ["partial", "full"])
def test_one_graph_without_a_break(mode: str, model: Any, tokenizer: Any) -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    options = {"backend": counter, "fullgraph": True}
    generator = HFGenerator(model, tokenizer, 24, compile=mode, compile_options=options)
    for prompt in ("hello there", "a rather longer prompt", "short"):
        got = generator.generate(prompt, use_chat_template=False)["output_tokens"]
        check(model, tokenizer, prompt, got, 24)
    assert counter.frame_count == {"partial": 1, "full": 2}[mode]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own
def test_compiled_by_inductor(model: Any, tokenizer: Any) -> None:
    from hqq.backends.compiled import BACKEND

    if not torch.cuda.is_available() and BACKEND.available():
        pytest.skip(str(BACKEND.available()))
    generator = HFGenerator(model, tokenizer, 16, compile="partial").warmup(1)
    got = generator.generate("hello there", use_chat_template=False)["output_tokens"]
    check(model, tokenizer, "hello there", got, 16)


def test_a_model_with_a_sliding_window(seed: int, tokenizer: Any) -> None:
    torch.manual_seed(seed)
    config = transformers.MistralConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        sliding_window=16,
        initializer_range=0.2,
        eos_token_id=None,
    )
    model = transformers.MistralForCausalLM(config).eval()
    generator = HFGenerator(model, tokenizer, 40)
    prompts = ["hello", "a prompt longer than the window is"]
    batch = generator.generate(prompts, use_chat_template=False)
    check(model, tokenizer, prompts, batch["output_tokens"], 40)


def test_sampling_repeats_with_a_seed_and_differs_without(model: Any, tokenizer: Any) -> None:
    def texts(**options: Any) -> list[list[int]]:
        generator = HFGenerator(model, tokenizer, 24, do_sample=True, temperature=2.0, top_k=None, **options)
        return [generator.generate("x", use_chat_template=False)["output_tokens"].tolist() for _ in range(2)]

    seeded = texts(seed=5)
    assert seeded[0] == seeded[1] == texts(seed=5)[0]
    free = texts()
    assert free[0] != free[1]  # 24 tokens of a flat distribution over 258
    one = HFGenerator(model, tokenizer, 24, do_sample=True, temperature=2.0, top_k=1)
    check(model, tokenizer, "x", one.generate("x", use_chat_template=False)["output_tokens"], 24)


def test_rows_of_a_batch_are_drawn_independently(model: Any, tokenizer: Any) -> None:
    generator = HFGenerator(model, tokenizer, 24, do_sample=True, temperature=2.0, top_k=None, seed=1)
    first, second = generator.generate(["same", "same"], use_chat_template=False)["output_tokens"]
    assert not torch.equal(first, second)


def test_repetition_penalty(model: Any, tokenizer: Any) -> None:
    generator, prompts = HFGenerator(model, tokenizer, 24, repetition_penalty=1.5), ["ab", "longer prompt"]
    got = generator.generate(prompts, use_chat_template=False)["output_tokens"]
    check(model, tokenizer, prompts, got, 24, Sampling(repetition_penalty=1.5))


def test_end_tokens_end_rows_one_by_one(model: Any, tokenizer: Any) -> None:
    prompts = ["hello", "another one"]
    full = HFGenerator(model, tokenizer, 30).generate(prompts, use_chat_template=False)["output_tokens"]
    full = [tokens.tolist() for tokens in full]
    end = full[0][6]
    generator = HFGenerator(model, tokenizer, 30, eos_token_id=end)
    result = generator.generate(prompts, use_chat_template=False)
    for row, tokens in enumerate(full):
        expected = tokens[: tokens.index(end)] if end in tokens else tokens
        assert result["output_tokens"][row].tolist() == expected
        assert result["finish_reason"][row] == ("eos" if end in tokens else "length")


def test_stop_strings_end_the_text_before_them(shipped: tuple[Any, Any]) -> None:
    model, tokenizer = shipped
    whole = HFGenerator(model, tokenizer, 40).generate(PROMPTS[0], use_chat_template=False)["output_text"]
    stop = whole[12:15]
    generator = HFGenerator(model, tokenizer, 40, stop=[stop, "never in there"])
    result = generator.generate(PROMPTS[0], use_chat_template=False)
    assert result["output_text"] == whole[: whole.index(stop)]
    assert result["finish_reason"] == "stop"
    assert "".join(generator.stream(PROMPTS[0], use_chat_template=False)) == result["output_text"]


def test_text_comes_as_it_is_printed(shipped: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = shipped
    generator = HFGenerator(model, tokenizer, 12)
    result = generator.generate(PROMPTS[0], use_chat_template=False, print_tokens=True)
    assert capsys.readouterr().out == result["output_text"]
    pieces = generator.stream(PROMPTS[0], use_chat_template=False)
    assert result["output_text"].startswith(next(pieces))


def test_characters_of_several_tokens_are_not_torn(model: Any, tokenizer: Any) -> None:
    from hqq.models.generation.text_stream import TextStream

    text = "né → 日本 end"
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in tokenizer(text)["input_ids"]]
    assert "".join([*pieces, stream.finish()]) == text == stream.text
    assert all("\ufffd" not in piece for piece in pieces)
    assert "日" in pieces


def test_the_steps_are_those_of_generate(model: Any, tokenizer: Any) -> None:
    generator = HFGenerator(model, tokenizer, 10)
    whole = generator.generate("hello", use_chat_template=False)
    generator.setup(generator.tokenize_prompt("hello", use_chat_template=False), 10)
    tokens = [generator.prefill().clone()]
    for _ in range(9):
        tokens.append(generator.gen_next_token(tokens[-1]).clone())
    assert torch.cat(tokens, 1)[0].tolist() == whole["output_tokens"].tolist()
    generator.setup(generator.tokenize_prompt("hello", use_chat_template=False), 10)
    again = generator.next_token_iterator(generator.prefill(), 10, verbose=False, print_tokens=False)
    assert again["output_text"] == whole["output_text"]
    slow = generator.generate_("hello", use_chat_template=False)
    for made in (whole, slow):
        check(model, tokenizer, "hello", made["output_tokens"], 10)


def test_chat_template(model: Any, tokenizer: Any) -> None:
    generator = HFGenerator(model, tokenizer, 5)
    with pytest.raises(ConfigError, match="without a chat template; pass use_chat_template=False"):
        generator.generate("hello")
    tokenizer.chat_template = TEMPLATE
    assert tokenizer.decode(generator.generate("hello")["input_tokens"]) == "[user] hello > "


def test_the_cache_is_kept_and_grows_when_it_must(model: Any, tokenizer: Any) -> None:
    generator = HFGenerator(model, tokenizer, 20)
    generator.generate("hello", use_chat_template=False)
    first = generator._decoder
    generator.generate("hello world", use_chat_template=False)
    assert generator._decoder is first
    long = "x" * 60
    got = generator.generate(long, use_chat_template=False)["output_tokens"]
    assert generator._decoder is not first
    check(model, tokenizer, long, got, 20)


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"compile": "all"}, {}, 'got compile=\'all\'; expected None, "partial" or "full"'),
        ({"seed": 1}, {}, "without sampling; pass do_sample=True"),
        ({"max_new_tokens": 0}, {}, "got max_new_tokens=0; expected at least 1"),
        ({"stop": ["a", ""]}, {}, "got an empty stop string"),
        ({}, {"prompt": ""}, "got an empty prompt"),
        ({}, {"prompt": []}, r"got prompt=\[\]; expected a str, or a list of at least one"),
        ({}, {"max_new_tokens": -1}, "got max_new_tokens=-1"),
        (
            {"max_new_tokens": 126},
            {},
            "got a prompt of 5 tokens and max_new_tokens=126; the model's context holds 128",
        ),
        ({"cache_size": 20}, {"max_new_tokens": 16}, "cache_size holds 20: use max_new_tokens=15 or less"),
        ({"cache_size": 4}, {}, "cache_size holds 4: shorten the prompt"),
        ({}, {"prompt": ["a", "b"], "print_tokens": True}, "print_tokens=True with several prompts"),
    ],
)
def test_bad_arguments(
    options: dict[str, Any], call: dict[str, Any], message: str, model: Any, tokenizer: Any
) -> None:
    with pytest.raises(ConfigError, match=message):
        HFGenerator(model, tokenizer, **{"max_new_tokens": 8, **options}).generate(
            **{"prompt": "hello", "use_chat_template": False, **call}
        )


def test_steps_beyond_the_cache(model: Any, tokenizer: Any) -> None:
    generator = HFGenerator(model, tokenizer, 3, cache_size=8)
    generator.setup(generator.tokenize_prompt("hello", use_chat_template=False), 3)
    token = generator.prefill()
    for _ in range(3):
        token = generator.gen_next_token(token)
    with pytest.raises(ConfigError, match="got a step beyond the cache of 8 tokens; set up with a larger"):
        generator.gen_next_token(token)


def test_steps_without_a_prompt(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"call setup\(tokenize_prompt"):
        HFGenerator(model, tokenizer).prefill()


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_graphs_need_a_gpu(model: Any, tokenizer: Any) -> None:
    generator = HFGenerator(model, tokenizer, 8)
    with pytest.raises(
        BackendError, match="got a model on cpu; CUDA graphs need all of it on one CUDA device"
    ):
        generator.enable_cuda_graph()
    got = generator.generate("hello", use_chat_template=False)["output_tokens"]
    check(model, tokenizer, "hello", got, 8)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # its advice
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", [None, "partial"])
@pytest.mark.parametrize("sampled", [False, True])
def test_graphs_repeat_the_step(mode: str | None, sampled: bool, model: Any, tokenizer: Any) -> None:
    model = model.cuda()
    sampling = (
        {"do_sample": True, "temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 3} if sampled else {}
    )
    prompts = ["hello", "a longer prompt"]
    plain = HFGenerator(model, tokenizer, 24, repetition_penalty=1.2, **sampling)
    graphed = HFGenerator(model, tokenizer, 24, repetition_penalty=1.2, compile=mode, **sampling)
    graphed.enable_cuda_graph()
    for prompt in (prompts[0], prompts[1], prompts):
        expected = plain.generate(prompt, use_chat_template=False)["output_tokens"]
        got = graphed.generate(prompt, use_chat_template=False)["output_tokens"]
        assert graphed._decoder is not None
        assert graphed._decoder._graph is not None
        texts = got if isinstance(prompt, list) else [got]
        if mode is None:
            for a, b in zip(expected if isinstance(prompt, list) else [expected], texts, strict=True):
                assert torch.equal(a, b)
            continue
        # Compiled kernels may round differently.
        ids = [tokenizer(one)["input_ids"] for one in ([prompt] if isinstance(prompt, str) else prompt)]
        assert [len(text) for text in texts] == [24] * len(ids)
        check_texts(model, ids, [text.tolist() for text in texts], graphed.sampling, graphed.seed)


def test_patched_runtime_gives_the_same_and_is_undone(model: Any, tokenizer: Any) -> None:
    from torch._dynamo.testing import CompileCounter

    expected = reference(model, tokenizer, "hello there", 20)
    settings, keys = model.generation_config.to_dict(), list(model.state_dict())
    counter = CompileCounter()
    patch_model_for_compiled_runtime(
        model, tokenizer, max_new_tokens=4, compile_options={"backend": counter, "fullgraph": True}
    )
    warm = counter.frame_count
    assert warm == 1  # one length of cache for all prompts of the warm-up
    assert list(model.state_dict()) == keys
    made = [reference(model, tokenizer, "hello there", 20) for _ in range(2)]
    assert counter.frame_count == warm
    with pytest.raises(ConfigError, match="patched already"):
        patch_model_for_compiled_runtime(model)
    unpatch_model_for_compiled_runtime(model)
    assert "forward" not in vars(model)
    assert model.generation_config.to_dict() == settings
    for text in made:  # judged by the model without the patch
        check(model, tokenizer, "hello there", text, 20)
    assert torch.equal(reference(model, tokenizer, "hello there", 20), expected)


def test_patched_models_do_not_use_up_each_others_graphs(seed: int, tokenizer: Any) -> None:
    options = {"backend": "eager", "fullgraph": True}
    with torch._dynamo.config.patch(recompile_limit=1):
        for number in range(2):
            model = endless(seed + number)
            patch_model_for_compiled_runtime(model, tokenizer, max_new_tokens=4, compile_options=options)
            got = reference(model, tokenizer, "hello", 4)
            unpatch_model_for_compiled_runtime(model)
            check(model, tokenizer, "hello", got, 4)


def test_compiled_prompts_leave_a_cache_that_stays_in_place(model: Any, tokenizer: Any) -> None:
    options = {"backend": "eager", "fullgraph": True}
    patch_model_for_compiled_runtime(model, warmup=False, compile_prefill=True, compile_options=options)
    ids = torch.tensor([tokenizer("hello")["input_ids"]])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=1,
        return_dict_in_generate=True,
    )
    unpatch_model_for_compiled_runtime(model)
    check(model, tokenizer, "hello", out.sequences[0, ids.shape[1] :], 4)
    for layer in out.past_key_values.layers:
        # What CUDA graphs ask for: torch marks it so where it is told that a tensor does not move.
        assert layer.keys._dynamo_static_input_type and layer.values._dynamo_static_input_type


def test_nothing_is_collected_while_a_graph_may_be_recorded(model: Any, tokenizer: Any) -> None:
    enabled: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        def run(*args: Any) -> Any:
            enabled.append(gc.isenabled())
            return graph.forward(*args)

        return run

    options = {"backend": backend, "fullgraph": True}
    generator = HFGenerator(model, tokenizer, 4, compile="partial", compile_options=options)
    generator.generate("hello", use_chat_template=False)
    assert enabled == [False] * 3 and gc.isenabled()


def test_hooks_of_accelerate_compile(model: Any, tokenizer: Any) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    from torch._dynamo.testing import CompileCounter

    expected = reference(model, tokenizer, "hello", 12)
    for layer in model.model.layers:
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    options = {"backend": CompileCounter(), "fullgraph": True}
    generator = HFGenerator(model, tokenizer, 12, compile="partial", compile_options=options)
    got = generator.generate("hello", use_chat_template=False)["output_tokens"]
    hooks.remove_hook_from_submodules(model)
    assert not hasattr(model.model.layers[0], "_hf_hook")
    check(model, tokenizer, "hello", got, 12)
    assert torch.equal(reference(model, tokenizer, "hello", 12), expected)
    hook = hooks.AlignDevicesHook(execution_device="cpu", offload=True, weights_map={})
    model.model.norm._hf_hook = hook
    with pytest.raises(BackendError, match="offloaded weights"):
        HFGenerator(model, tokenizer, 12, compile="partial")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fused_kernels_give_the_eager_tokens(dtype: torch.dtype, axis: int) -> None:
    from hqq.backends.prepare import prepare_for_inference

    model = transformers.AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=dtype).cuda()
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHIPPED)
    config = QuantConfig(nbits=4, group_size=64, axis=axis)
    quantize_model(model, config, compute_dtype=dtype, progress=False)
    prepare_for_inference(model, backend="pytorch")
    eager = HFGenerator(model, tokenizer, 64, step="transformers").generate(PROMPTS, use_chat_template=False)
    prepare_for_inference(model, allow_merge=True)
    generator = HFGenerator(model, tokenizer, 64)
    assert generator.step_reason is None
    fused = generator.generate(PROMPTS, use_chat_template=False)
    prepare_for_inference(model, backend="pytorch")
    unit = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    for prompt, a, b in zip(PROMPTS, eager["output_tokens"], fused["output_tokens"], strict=True):
        count = min(len(a), len(b))
        parted = (a[:count] != b[:count]).nonzero()
        if len(parted) == 0:
            continue
        # Where the texts part, the two tokens must have been as likely, up to the roundings of five layers.
        place = int(parted[0])
        ids = torch.cat([torch.tensor(tokenizer(prompt)["input_ids"]), a[:place]])[None].cuda()
        with torch.no_grad():
            logits = model(ids).logits[0, -1].float()
        difference = float(logits[a[place]] - logits[b[place]])
        assert abs(difference) <= 16 * unit * float(logits.abs().max())
