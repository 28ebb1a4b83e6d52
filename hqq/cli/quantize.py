"""`hqq quantize`: from a model to a quantised checkpoint, a complete folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from hqq.cli.output import Output, size
from hqq.cli.settings import check_target, config_of, dtype_of
from hqq.core.devices import resolve_device
from hqq.models.checkpoint import save_quantized
from hqq.models.load import open_full
from hqq.models.quantize import quantize_model
from hqq.models.report import QuantizationReport


def run(args: argparse.Namespace) -> Output:
    """Quantise and write; return the report. What is wrong with options or target is found before the work."""
    config, target = config_of(args), Path(args.out).expanduser()
    check_target(target, args.overwrite)
    model = open_full(args.model, dtype=dtype_of(args), progress=not args.quiet)
    report = quantize_model(
        model,
        config,
        compute_dtype=dtype_of(args),
        device=resolve_device(args.device),
        skip=("lm_head",) if args.skip is None else ("lm_head", *args.skip),
        embeddings=args.embeddings,
        lm_head=args.lm_head,
        progress=not args.quiet,
        errors=True,
    )
    save_quantized(model, target, format=args.format, overwrite=args.overwrite)
    data = {"model": args.model, "out": str(target), "format": args.format, **report.to_dict()}
    return Output(data, _text(report, str(target)))


def _text(report: QuantizationReport, target: str) -> str:
    lines = [
        f"wrote {target}: {len(report.layers)} layers quantised in {report.seconds:.1f} s, {size(report.bytes)} "
        f"for {report.weights:,} weights, {report.effective_bits:.3f} bits per weight"
    ]
    by_reason: dict[str, list[str]] = {}
    for row in report.left:
        # The library's arguments, as this command calls them.
        reason = row.reason.replace("lm_head=True", "--lm-head").replace("embeddings=True", "--embeddings")
        by_reason.setdefault(reason, []).append(row.name)
    for reason, names in by_reason.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"left as it was: {shown} ({reason})")
    return "\n".join(lines)
