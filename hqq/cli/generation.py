"""`hqq generate`: text from a model or checkpoint."""

from __future__ import annotations

import argparse

from hqq.cli.output import Output
from hqq.cli.settings import dtype_of
from hqq.models.load import open_model, open_tokenizer
from hqq.models.text import generate_text


def run(args: argparse.Namespace) -> Output:
    """Return the prompt and how the model goes on."""
    tokenizer = open_tokenizer(args.path)
    model = open_model(args.path, dtype=dtype_of(args), device=args.device, progress=not args.quiet)
    text = generate_text(
        model,
        tokenizer,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )
    return Output({"model": args.path, "prompt": args.prompt, "text": text}, args.prompt + text)
