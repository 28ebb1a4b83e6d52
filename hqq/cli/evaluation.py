"""`hqq eval`: perplexity on a text file."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from hqq.cli.output import Output, number
from hqq.cli.settings import dtype_of
from hqq.errors import ConfigError
from hqq.models.evaluate import perplexity
from hqq.models.load import open_model, open_tokenizer


def run(args: argparse.Namespace) -> Output:
    """Return perplexity and what it was measured on."""
    text = _read(Path(args.text))
    tokenizer = open_tokenizer(args.path)
    model = open_model(args.path, dtype=dtype_of(args), device=args.device, progress=not args.quiet)
    result = perplexity(
        model,
        tokenizer,
        text,
        window=args.window,
        stride=args.stride,
        batch_size=args.batch_size,
        max_tokens=args.max_tokens,
        progress=not args.quiet,
    )
    data = {"model": args.path, "text": args.text, **asdict(result)}
    rate = result.tokens / result.seconds
    return Output(
        data,
        f"perplexity {number(result.perplexity)}  ({result.nll:.4f} nats per token, {result.tokens} tokens, "
        f"window {result.window}, stride {result.stride}, {result.seconds:.1f} s, {rate:.0f} tokens/s)",
    )


def _read(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"got {str(path)!r}, which is not UTF-8 ({error.reason}); expected a text file"
        ) from error
