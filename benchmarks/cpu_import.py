"""How long `import hqq` and `import hqq.core.quantize` take beyond torch's own import.

    python -m benchmarks.cpu_import [--repetitions 7] [--output FILE]

Each repetition is a fresh interpreter that imports torch, then hqq, then hqq.core.quantize; the files are in the
system's cache after the first, which is not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import RESULTS, record, spread, table, write_json

PROGRAM = """
import json, time
times = {}
for name in ("torch", "hqq", "hqq.core.quantize"):
    start = time.perf_counter()
    __import__(name)
    times[name] = time.perf_counter() - start
print(json.dumps(times))
"""


def import_seconds(repetitions: int) -> dict[str, list[float]]:
    """Return the seconds of each import in each of `repetitions` fresh interpreters."""
    times: dict[str, list[float]] = {}
    for repetition in range(repetitions + 1):
        run = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
        if repetition:
            for name, value in json.loads(run.stdout).items():
                times.setdefault(name, []).append(value)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_import.json")
    arguments = parser.parse_args()
    rows = [
        {"import": name, **spread(times)} for name, times in import_seconds(arguments.repetitions).items()
    ]
    print(table(rows))
    write_json(arguments.output, record(rows, repetitions=arguments.repetitions))


if __name__ == "__main__":
    main()
