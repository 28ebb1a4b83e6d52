"""The corpus splits without leaks, the shipped model is what its card says, and the training script works."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import stdlib_corpus
import stdlib_figures
import stdlib_training
import torch
import train_stdlib_model
import transformers
from safetensors import safe_open

SHIPPED = Path(train_stdlib_model.__file__).with_name("stdlib-llama")


def line_runs(text: str, length: int = 8) -> list[int]:
    """Hashes of every run of `length` consecutive lines that are not blank, indentation aside."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [hash(tuple(lines[i : i + length])) for i in range(len(lines) - length + 1)]


@pytest.fixture(scope="module")
def corpus() -> stdlib_corpus.Corpus:
    return stdlib_corpus.collect()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def held_out_ids(tokenizer: Any) -> list[int]:
    text = (SHIPPED / "heldout.txt").read_bytes().decode()
    return list(tokenizer(text, verbose=False)["input_ids"])


class TestSplit:
    def test_held_out_modules_and_their_tests_are_in_no_other_split(
        self, corpus: stdlib_corpus.Corpus
    ) -> None:
        held_out = {document.path for document in corpus.held_out}
        assert {f"{module}.py" for module in stdlib_corpus.HELD_OUT} <= held_out
        for document in corpus.train + corpus.validation:
            stem = Path(document.path).stem
            assert stem.removeprefix("test_") not in stdlib_corpus.HELD_OUT, document.path

    def test_splits_share_no_file_and_no_text(self, corpus: stdlib_corpus.Corpus) -> None:
        documents = corpus.train + corpus.validation + corpus.held_out
        assert len({document.path for document in documents}) == len(documents)
        assert len({document.text for document in documents}) == len(documents)

    def test_held_out_passages_are_not_copied_in_the_training_text(
        self, corpus: stdlib_corpus.Corpus
    ) -> None:
        seen = {run for document in corpus.train for run in line_runs(document.text)}
        texts = [document.text for document in corpus.held_out] + [
            (SHIPPED / "heldout.txt").read_text("utf-8")
        ]
        runs = [run for text in texts for run in line_runs(text)]
        # What remains (0.3 %) are a dozen small classes that test_heapq shares with the tests of itertools.
        assert sum(run in seen for run in runs) < 0.01 * len(runs)

    def test_reading_again_gives_the_same_corpus(self, corpus: stdlib_corpus.Corpus, tmp_path: Path) -> None:
        again = stdlib_corpus.collect()
        assert again.digest() == corpus.digest()
        assert [d.path for d in again.train] == sorted(d.path for d in corpus.train)
        small = stdlib_corpus.Corpus("3", "L", corpus.train[:5], corpus.validation[:2], corpus.held_out[:2])
        stdlib_corpus.save(small, tmp_path / "deep" / "corpus.xz")
        assert stdlib_corpus.load(tmp_path / "deep" / "corpus.xz") == small
        assert small.digest() != corpus.digest()

    def test_only_hand_written_library_source_is_taken(self, tmp_path: Path) -> None:
        code = "def double(number):\n    return number + number\n"
        files = {
            "wave.py": code + "# wave\n",
            "heapq.py": code + "# heapq\n",
            "test/test_heapq.py": code + "# test\n",
            "test/test_free_threading/test_heapq.py": code + "# threads\n",
            "json/scanner.py": code + "# json\n",
            "copy.py": code + "# copy\n",
            "string/templatelib.py": code + "# templates\n",
            "zebra.py": code + "# wave\n",  # the same text twice
            "empty.py": "\n\n",
            "table.py": "rows = (1, 2, 3, 4, 5, 6, 7, 8, 9)\n" * 9,
            "encodings/cp9.py": code + "decoding_table = ''\n",
            "site-packages/torch.py": code + "# torch\n",
            "lib2to3/tests/data/crlf.py": code + "# data\n",
            "_sysconfigdata__linux.py": code + "# build\n",
            "config-3-linux/python-config.py": code + "# config\n",
        }
        order = list(files)
        random.shuffle(order)
        for name in order:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(files[name], encoding="utf-8")
        (tmp_path / "latin.py").write_bytes(code.encode() + b"# caf\xe9\n")
        (tmp_path / "surrogate.py").write_bytes(code.encode() + b"# \xed\xa0\x80\n")
        corpus = stdlib_corpus.collect(tmp_path)
        assert [d.path for d in corpus.train] == ["json/scanner.py", "wave.py"]
        assert [d.path for d in corpus.validation] == ["copy.py", "string/templatelib.py"]
        held_out = ["heapq.py", "test/test_free_threading/test_heapq.py", "test/test_heapq.py"]
        assert [d.path for d in corpus.held_out] == held_out
        assert corpus.shipped_text() == files["heapq.py"]


class TestFigures:
    def test_every_token_is_predicted_once_within_its_window(self) -> None:
        generator = torch.Generator().manual_seed(random.randrange(2**32))
        table = torch.randn(11, 11, generator=generator)

        class Bigram(torch.nn.Module):
            """Predicts from the last token, and from its place in the window, so that the windows matter."""

            def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
                places = torch.arange(input_ids.shape[1])[None, :, None]
                return transformers.modeling_outputs.CausalLMOutput(logits=table[input_ids] * (1 + places))

        for length in (2, 8, 9, 10, 41, 70):
            tokens = torch.randint(11, (length,), generator=generator, dtype=torch.int32)
            expected = 0.0
            for position in range(1, length):
                scores = [x * (1 + (position - 1) % 8) for x in table[tokens[position - 1]].tolist()]
                total = math.fsum(math.exp(x) for x in scores)
                expected += math.log(total) - scores[int(tokens[position])]
            # float32 log-softmax of scores below 50: an error of at most some 50 * 2**-23 a token
            nats = stdlib_figures.nats_per_token(Bigram(), tokens, context=8, batch=3)
            assert nats == pytest.approx(expected / (length - 1), abs=1e-5)

    def test_unigram_counts_training_tokens_once_more_than_seen(self) -> None:
        train, text = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 3])
        expected = -(math.log(2 / 8) + math.log(1 / 8)) / 2
        assert stdlib_figures.unigram_nats_per_token(train, text, 4) == pytest.approx(expected, rel=1e-12)

    def test_bits_per_byte_of_a_uniform_guess(self) -> None:
        score = stdlib_figures.score(math.log(256), tokens=10, size=20)
        assert score == {"perplexity": pytest.approx(256), "bits_per_byte": pytest.approx(4)}


class TestTraining:
    def test_attention_of_whole_windows_is_the_stock_one(self) -> None:
        config = stdlib_training.model_config(257)
        model = stdlib_training.new_model(config, torch.device("cpu"))
        stock = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, "dtype": "float32"}))
        stock.load_state_dict(model.state_dict())
        ids = torch.randint(257, (2, 50))
        with torch.no_grad():
            ours, theirs = model(input_ids=ids).logits, stock(input_ids=ids).logits
        # Sums over 512 float32 products at the longest, some five layers deep; logits are of order one.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=5 * 512 * torch.finfo(torch.float32).eps)

    def test_windows_are_runs_of_the_stream_and_cover_it(self) -> None:
        stream = torch.arange(10 * stdlib_training.CONTEXT, dtype=torch.int32)
        batches = stdlib_training.windows(stream, 3, torch.Generator().manual_seed(random.randrange(2**32)))
        epoch = torch.cat([next(batches) for _ in range(3)])
        assert epoch.shape == (9, stdlib_training.CONTEXT + 1)
        assert bool((epoch.diff(dim=1) == 1).all())
        starts = epoch[:, 0].sort().values
        assert starts.diff().tolist() == [stdlib_training.CONTEXT] * 8
        assert int(epoch.max()) < len(stream)

    def test_the_script_writes_a_folder_whose_figures_hold(
        self, corpus: stdlib_corpus.Corpus, tmp_path: Path
    ) -> None:
        train = tuple(d for d in corpus.train if d.path.startswith("json/"))
        held_out = tuple(d for d in corpus.held_out if d.path in ("heapq.py", "sched.py"))
        validation = tuple(d for d in corpus.validation if d.path == "bisect.py")
        file, folder = tmp_path / "corpus" / "text.xz", tmp_path / "model"
        stdlib_corpus.save(stdlib_corpus.Corpus("3.x", "A licence", train, validation, held_out), file)
        arguments = ["--corpus", str(file), "--output", str(folder), "--device", "cpu", "--batch-size", "1"]
        assert train_stdlib_model.main([*arguments, "--steps", "6"]) == 0
        assert (folder / "heldout.txt").read_bytes().decode() == held_out[0].text + held_out[1].text
        assert (folder / "LICENSE").read_text("utf-8") == "A licence"

        figures = json.loads((folder / "training.json").read_text("utf-8"))
        curve = [point["nats"] for point in figures["training"]["validation_curve"]]
        assert len(curve) == 6 and min(curve) < curve[0]
        assert figures["training"]["tokens_seen"] == 6 * stdlib_training.CONTEXT

        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = tokenizer((folder / "heldout.txt").read_bytes().decode(), verbose=False)["input_ids"]
        assert len(ids) == figures["held_out"]["tokens"]
        total = 0.0
        for start in range(0, len(ids) - 1, stdlib_training.CONTEXT):
            window = torch.tensor([ids[start : start + stdlib_training.CONTEXT + 1]])
            with torch.no_grad():
                total += model(input_ids=window, labels=window).loss.item() * (window.shape[1] - 1)
        nats = math.log(figures["held_out"]["perplexity"])
        assert nats == pytest.approx(total / (len(ids) - 1), rel=1e-5)
        bits = figures["held_out"]["bits_per_byte"] * (folder / "heldout.txt").stat().st_size
        assert bits == pytest.approx(total / math.log(2), rel=1e-5)
        card = (folder / "README.md").read_text("utf-8")
        assert f"**{figures['held_out']['perplexity']:.2f}**" in card and "{" not in card.split("```")[0]


class TestShippedModel:
    def test_weights_are_small_and_every_dimension_divides_by_128(self) -> None:
        file = SHIPPED / "model.safetensors"
        assert file.stat().st_size <= 8_000_000
        with safe_open(file, framework="pt") as weights:
            tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 - no iterator
        assert sum(tensor.numel() for tensor in tensors.values()) <= 4_000_000
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
        assert all(size % 128 == 0 for tensor in tensors.values() for size in tensor.shape)

    def test_any_text_round_trips(self, tokenizer: Any) -> None:
        characters = [*map(chr, range(1, 0xD800)), *map(chr, range(0xE000, 0x110000))]
        points = random.choices(characters, k=500)
        shipped = (SHIPPED / "heldout.txt").read_bytes().decode()
        for text in ("".join(points), "\r\n\t if x :\n\n   y\t\n", shipped):
            ids = tokenizer(text, verbose=False)["input_ids"]
            assert tokenizer.decode(ids) == text

    def test_digits_stand_alone_and_indentation_is_one_token(self, tokenizer: Any) -> None:
        pieces = [tokenizer.decode([i]) for i in tokenizer("def f():\n        return 2048\n")["input_ids"]]
        assert pieces[-5:] == ["2", "0", "4", "8", "\n"]
        assert "\n        " in pieces

    def test_perplexity_is_a_trained_models_and_the_one_recorded(self, held_out_ids: list[int]) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
        recorded = json.loads((SHIPPED / "training.json").read_text("utf-8"))
        nats = stdlib_figures.nats_per_token(model, torch.tensor(held_out_ids), recorded["context"])
        # Float32 on another device: sums of up to 512 products, five layers deep, in another order.
        rounding = 5 * 512 * torch.finfo(torch.float32).eps
        assert nats == pytest.approx(math.log(recorded["held_out"]["perplexity"]), rel=rounding)
        # No unigram model does better on this text than the one fitted to the text itself.
        counts = Counter(held_out_ids)
        best_unigram = -sum(n * math.log(n / len(held_out_ids)) for n in counts.values()) / len(held_out_ids)
        assert recorded["held_out_unigram"]["perplexity"] > 0.99 * math.exp(best_unigram)
        assert math.exp(nats) < math.exp(best_unigram) / 10
