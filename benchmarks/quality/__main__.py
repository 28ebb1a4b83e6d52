"""KL divergence and perplexity of a model at each setting, the solvers side by side.

    python -m benchmarks.quality [--model PATH] [--text FILE] [--bits 4 3 2] [--group-sizes 64 channel] [--axes 1 0]
                                 [--solvers als hqq minmax] [--calibrations none self random] [--seeds 0]
                                 [--windows 48] [--length 512] [--device cpu] [--output FILE] [--picture FILE]

All linear layers but the head are quantised, scale and zero stored in bfloat16. KL(full || quantised) is in nats a
token over consecutive windows of the text; errors are standard errors over windows, and those of ratios are of the
same windows under both solvers. Calibration is with the solver als, from each of the seeds. "hqq" is the original's
solver, whose results this package reproduces bit for bit.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import RESULTS, record, table, write_json
from benchmarks.quality.divergence import Outcome, Setting, Study, mean_and_error, ratio_and_error
from benchmarks.quality.picture import draw

SHIPPED = Path(__file__).resolve().parents[2] / "examples" / "stdlib-llama"
BASELINE = "hqq"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=str(SHIPPED), help="local path or hub id of a causal language model"
    )
    parser.add_argument("--text", type=Path, default=SHIPPED / "heldout.txt")
    parser.add_argument("--bits", type=float, nargs="+", default=[8, 6, 5, 4, 3, 2, 1.58, 1])
    parser.add_argument("--group-sizes", nargs="+", default=["64"], help="numbers, or channel")
    parser.add_argument("--axes", type=int, nargs="+", default=[1, 0])
    parser.add_argument("--solvers", nargs="+", default=["als", "hqq", "minmax"])
    parser.add_argument("--calibrations", nargs="+", default=["none"], choices=["none", "self", "random"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of text and random tokens")
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--output", type=Path, default=RESULTS / "quality.json")
    parser.add_argument("--picture", type=Path)
    return parser.parse_args()


def rows_of(study: Study, settings: list[Setting]) -> list[dict[str, Any]]:
    """Return one row for each of these settings, which share bits, group size and axis."""
    outcomes = {setting: study.judge(setting, torch.bfloat16) for setting in settings}
    baseline = next((outcomes[setting] for setting in settings if setting.solver == BASELINE), None)
    return [
        {
            "nbits": setting.nbits,
            "group_size": setting.group_size or "channel",
            "axis": setting.axis,
            "solver": setting.solver,
            "calibration": setting.calibration,
            "seed": None if setting.calibration == "none" else setting.seed,
            **figures(outcome, baseline),
        }
        for setting, outcome in outcomes.items()
    ]


def settings_of(
    nbits: float, group_size: int | None, axis: int, arguments: argparse.Namespace
) -> list[Setting]:
    """Return what to compare: solvers without data, then calibration."""
    nbits = int(nbits) if nbits == int(nbits) else nbits
    settings = []
    if "none" in arguments.calibrations:
        settings += [Setting(nbits, group_size, axis, solver) for solver in arguments.solvers]
    return settings + [
        Setting(nbits, group_size, axis, "als", calibration, seed)
        for calibration in arguments.calibrations
        if calibration != "none"
        for seed in arguments.seeds
    ]


def figures(outcome: Outcome, baseline: Outcome | None) -> dict[str, float | None]:
    """Return what is reported of one setting and solver."""
    kl, kl_error = mean_and_error(outcome.kl)
    nll, nll_error = mean_and_error(outcome.nll)
    ratio = (None, None) if baseline is None else ratio_and_error(outcome.kl, baseline.kl)
    return {
        "bits_per_weight": round(outcome.bits, 4),
        "kl": kl,
        "kl_error": kl_error,
        "kl_ratio": ratio[0],
        "kl_ratio_error": ratio[1],
        "perplexity": math.exp(nll),
        "perplexity_error": math.exp(nll) * nll_error,
        "weight_error": outcome.error,
    }


def main() -> None:
    arguments = parse()
    study = Study(arguments.model, arguments.text, arguments.windows, arguments.length, arguments.device)
    nll, nll_error = mean_and_error(study.full_nll)
    full = {"perplexity": math.exp(nll), "perplexity_error": math.exp(nll) * nll_error}
    print(f"full precision: perplexity {full['perplexity']:.3f} ± {full['perplexity_error']:.3f}", flush=True)
    rows: list[dict[str, Any]] = []
    notes = {
        "model": Path(arguments.model).name,
        "text": arguments.text.name,
        "windows": study.windows,
        "length": arguments.length,
        "note": "KL in nats a token; scale and zero in bfloat16; ratios are to solver hqq on the same windows",
        "full_precision": full,
    }
    group_sizes = [None if size == "channel" else int(size) for size in arguments.group_sizes]
    for group_size, axis, nbits in itertools.product(group_sizes, arguments.axes, arguments.bits):
        found = rows_of(study, settings_of(nbits, group_size, axis, arguments))
        new = table(found).splitlines()
        print("\n".join(new[2:] if rows else new), flush=True)
        rows += found
        # After each setting: what is there stays if this is interrupted.
        write_json(arguments.output, record(rows, **notes))
    if arguments.picture is not None:
        draw(rows, arguments.picture)


if __name__ == "__main__":
    main()
