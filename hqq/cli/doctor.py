"""`hqq doctor`: what of the ecosystem is on this machine, and what works with it."""

from __future__ import annotations

import argparse

from hqq.cli.output import Output, size, table
from hqq.models.doctor import Diagnosis, diagnose


def run(args: argparse.Namespace) -> Output:
    """Return versions, devices, backends and what transformers needs."""
    found = diagnose()
    return Output(found.to_dict(), _text(found))


def _text(found: Diagnosis) -> str:
    lines = [f"hqq {found.hqq}, Python {found.python}, {found.platform}", ""]
    lines.append(
        table(["library", "version"], [[n, v or "not installed"] for n, v in found.libraries.items()], left=2)
    )
    lines += ["", f"CUDA {found.cuda or 'is not part of this torch'}"]
    lines += [f"  {d.name}, compute capability {d.capability}, {size(d.memory)}" for d in found.devices]
    if not found.devices:
        lines.append("  no device")
    lines.append("")
    rows = [[b.name, "works" if b.works else f"does not work: {b.reason}"] for b in found.backends]
    lines.append(table(["backend", "here"], rows, left=2))
    lines += [
        "",
        f"transformers: {found.transformers_text}",
        f"measured kernel choices: {found.cache_files} files in {found.cache_folder}",
    ]
    return "\n".join(lines)
