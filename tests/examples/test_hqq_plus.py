"""The HQQ+ example: a few steps of it on the shipped model, and what it trains on."""

from __future__ import annotations

import math
import re
import sysconfig
from pathlib import Path

import hqq_plus
import pytest
import stdlib_corpus
import torch
from stdlib_corpus import Corpus, Document
from stdlib_training import CONTEXT
from torch import nn

from hqq import QuantConfig
from hqq.core.peft import PeftUtils
from hqq.models.evaluate import perplexity
from hqq.models.load import open_full, open_tokenizer
from hqq.models.quantize import quantize_model

MODEL = hqq_plus.HERE / "stdlib-llama"
SECRET = "held_out_secret = 'never trained on'\n" * 400


@pytest.fixture
def small_corpus(monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """Some modules to train on; the other splits hold a text that no training token may come from."""
    root = Path(sysconfig.get_path("stdlib"))
    names = ("ast.py", "functools.py", "inspect.py", "typing.py")
    train = tuple(Document(name, (root / name).read_text(encoding="utf-8")) for name in names)
    secret = (Document("secret.py", SECRET),)
    corpus = Corpus("3", "", train, secret, secret)
    monkeypatch.setattr(stdlib_corpus, "collect", lambda: corpus)
    return corpus


@pytest.mark.slow
def test_adapters_lower_the_perplexity_and_load_again(
    small_corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "adapters.pt"
    options = [
        "--device",
        "cpu",
        "--tokens",
        "1500",
        "--steps",
        "12",
        "--batch-size",
        "1",
        "--rate",
        "1e-3",
        "--seed",
        "3",
    ]
    hqq_plus.main([*options, "--save", str(file)])
    out = capsys.readouterr().out
    reference, before, after = (float(value) for value in re.findall(r"perplexity (\d+\.\d+) on 1500", out))
    assert reference < after < before
    closed = math.log(before / after) / math.log(before / reference)
    stated = float(re.search(r"close (\d+)% of the gap", out)[1])
    # Of values printed with three decimals.
    assert stated == pytest.approx(100 * closed, abs=0.6)
    bits = [float(value) for value in re.findall(r"^(?:full|2 bit).*?  (\d+\.\d\d)  ", out, re.MULTILINE)]
    # Scale and zero in 16 bits for 64 weights; rank 8 in 16 bits on the Llama's projections of 256 and 512.
    assert bits == pytest.approx([16, 2 + 2 * 16 / 64, 2.5 + 16 * 8 * 4096 / 589824], abs=0.005)

    model = open_full(MODEL, progress=False)
    quantize_model(model, QuantConfig(nbits=2), compute_dtype=torch.float16, progress=False)
    model.to(torch.float32)
    PeftUtils.load_lora_weights(model, file, verbose=False)
    text = (MODEL / "heldout.txt").read_text(encoding="utf-8")
    again = perplexity(model, open_tokenizer(MODEL), text, stride=768, max_tokens=1500, progress=False)
    assert again.perplexity == pytest.approx(after, abs=0.01)


def test_only_the_training_split_is_trained_on(small_corpus: Corpus) -> None:
    tokenizer = open_tokenizer(MODEL)
    tokens = hqq_plus.training_tokens(tokenizer, 10**9, seed=0)
    text = tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
    assert len(text) == sum(len(document.text) for document in small_corpus.train)
    assert "held_out_secret" not in text
    few = hqq_plus.training_tokens(tokenizer, 1, seed=0)
    assert 3 * CONTEXT <= len(few) < len(tokens)


class Constant(nn.Module):
    """Gives the same logits whatever the input."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        return type("Output", (), {"logits": self.values})


def test_the_loss_is_the_divergence_from_the_teacher_per_token(rng: torch.Generator) -> None:
    own, teacher = (Constant(torch.randn(2, 5, 7, generator=rng, dtype=torch.float64)) for _ in range(2))
    P, Q = teacher.values.softmax(-1), own.values.softmax(-1)
    expected = (P * (P / Q).log()).sum() / 10
    loss = hqq_plus.distillation_loss(own, teacher, torch.zeros(2, 5, dtype=torch.int64))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert teacher.values.grad is None
    assert own.values.grad is not None


def test_training_stops_at_the_steps_or_the_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(hqq_plus._progress(4, 1e9)) == pytest.approx([0, 0.25, 0.5, 0.75])
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(hqq_plus.time, "monotonic", lambda: next(clock))
    assert list(hqq_plus._progress(100, 10)) == pytest.approx([0.3, 0.6, 0.9])


def test_options_are_checked_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        hqq_plus.main(["--device", "nowhere"])
    assert "nowhere" in capsys.readouterr().err
