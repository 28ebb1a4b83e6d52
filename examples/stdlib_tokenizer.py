"""A byte-level BPE tokenizer for Python source, and the token streams of the corpus, cached beside it."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from stdlib_corpus import Corpus, Document
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 3968  # 31 * 128, so that every dimension of the embedding divides by 128
SEPARATOR, PADDING = "<|endoftext|>", "<|pad|>"
SEPARATOR_ID, PADDING_ID = 0, 1

# Pieces that merges never cross: a word with one sign or space before it; one digit; a run of signs; a line's
# end with the next line's indentation, so that a word is the same token at any depth; other blanks.
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+[ \t]*|[ \t]+(?=[ \t]\S)|\s+"


def train_tokenizer(documents: Sequence[Document], vocabulary: int = VOCABULARY) -> Tokenizer:
    """Learn at most `vocabulary` tokens; every byte is one, so any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write `tokenizer.json` and a `tokenizer_config.json` that transformers 4.56 and 5 both read."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SEPARATOR,
        "eos_token": SEPARATOR,
        "pad_token": PADDING,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def token_stream(tokenizer: Tokenizer, documents: Sequence[Document]) -> torch.Tensor:
    """Tokens of the documents as one int32 vector, a separator before each document."""
    ids: list[int] = []
    for start in range(0, len(documents), 64):
        texts = [document.text for document in documents[start : start + 64]]
        for encoding in tokenizer.encode_batch(texts):
            ids.append(SEPARATOR_ID)
            ids.extend(encoding.ids)
    return torch.tensor(ids, dtype=torch.int32)


def prepare(corpus: Corpus, cache: Path | None = None) -> tuple[Tokenizer, dict[str, torch.Tensor]]:
    """Tokenizer trained on the training text, and the int32 token streams `train` and `validation`.

    With `cache`, a folder, both are kept there and reused as long as the corpus and its pieces are the same.
    """
    key = hashlib.sha256(f"{corpus.digest()} {VOCABULARY} {_PIECES}".encode()).hexdigest()
    if cache is not None and (cached := _read_cache(cache, key)) is not None:
        return cached
    tokenizer = train_tokenizer(corpus.train)
    streams = {name: token_stream(tokenizer, getattr(corpus, name)) for name in ("train", "validation")}
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(cache / "tokenizer.json"))
        packed = {name: stream.to(torch.uint16) for name, stream in streams.items()}
        save_file(packed, cache / "tokens.safetensors", metadata={"key": key})
    return tokenizer, streams


def _read_cache(cache: Path, key: str) -> tuple[Tokenizer, dict[str, torch.Tensor]] | None:
    tokenizer_file, token_file = cache / "tokenizer.json", cache / "tokens.safetensors"
    if not (tokenizer_file.is_file() and token_file.is_file()):
        return None
    with safe_open(token_file, framework="pt") as file:
        if file.metadata().get("key") != key:
            return None
        streams = {name: file.get_tensor(name).to(torch.int32) for name in file.keys()}  # noqa: SIM118 - no iterator
    return Tokenizer.from_file(str(tokenizer_file)), streams
