"""`hqq convert`: a checkpoint in the other format."""

from __future__ import annotations

import argparse
from pathlib import Path

from hqq.cli.output import Output
from hqq.cli.settings import check_target
from hqq.errors import CheckpointError
from hqq.models.checkpoint import convert_checkpoint, is_hqq_checkpoint
from hqq.models.checkpoint.layout import locate


def run(args: argparse.Namespace) -> Output:
    """Convert and return what was written."""
    target = Path(args.out).expanduser()
    check_target(target, args.overwrite)
    folder = locate(args.source)
    if not is_hqq_checkpoint(folder):
        raise CheckpointError(
            f"got {args.source!r}, which holds no quantised layer; expected an hqq checkpoint"
        )
    convert_checkpoint(folder, target, format=args.format, overwrite=args.overwrite)
    data = {"source": args.source, "out": str(target), "format": args.format}
    return Output(data, f"wrote {target} as {args.format}")
