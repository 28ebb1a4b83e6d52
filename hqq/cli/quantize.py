"""`hqq quantize`: from a model to a quantised checkpoint, a complete folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hqq.cli.output import Output, size
from hqq.cli.settings import check_target, config_of, dtype_of
from hqq.core.devices import resolve_device
from hqq.errors import ConfigError
from hqq.models.calibration import Calibration
from hqq.models.checkpoint import save_quantized
from hqq.models.load import open_full, open_tokenizer
from hqq.models.quantize import quantize_model
from hqq.models.report import QuantizationReport


def run(args: argparse.Namespace) -> Output:
    """Quantise and write; return the report. What is wrong with options or target is found before the work."""
    config, target = config_of(args), Path(args.out).expanduser()
    calibration = _calibration(args)
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
        calibration=calibration,
    )
    save_quantized(model, target, format=args.format, overwrite=args.overwrite)
    data = {"model": args.model, "out": str(target), "format": args.format, **report.to_dict()}
    return Output(data, _text(report, str(target)))


def _calibration(args: argparse.Namespace) -> Calibration | None:
    """Return what to calibrate with; options without --calibration are a mistake."""
    given = {"sequences": args.sequences, "length": args.length, "folder": args.work_folder}
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if args.calibration is None:
        if options:
            raise ConfigError(
                "got --sequences, --length or --work-folder without --calibration; say what to calibrate with, such "
                "as --calibration self"
            )
        return None
    if args.calibration in ("self", "random"):
        return Calibration(args.calibration, **options)
    text = Path(args.calibration).expanduser().read_text(encoding="utf-8")
    return Calibration([text], tokenizer=open_tokenizer(args.model), **options)


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
    calibrated = [row for row in report.layers if row.output_error is not None and row.fallback is None]
    if calibrated:
        before, after = (
            sum(getattr(row, name) for row in calibrated) / len(calibrated)
            for name in ("output_error_before", "output_error")
        )
        lines.append(
            f"calibrated {len(calibrated)} layers: mean relative error of their outputs {before:.4f} -> {after:.4f}"
        )
    lines += [f"not calibrated: {name} ({reason})" for name, reason in report.fallbacks.items()]
    return "\n".join(lines)
