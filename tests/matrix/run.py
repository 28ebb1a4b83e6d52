"""Run the transformers tests in an environment of each supported version, and print versions x rows.

    python tests/matrix/run.py                      every version, environments made where they are missing
    python tests/matrix/run.py 4.56.2 newest        some versions
    python tests/matrix/run.py --environments DIR   where the environments are (default: .venv-matrix)

An environment is made by pip, with torch as constraints.txt pins it. "newest" is the newest release there is.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import venv
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "integrations" / "transformers" / "test_versions.py"
VERSIONS = ("4.56.2", "4.57.6", "5.0.0", "5.17.0", "5.23.0", "newest")
# What every version works with; what transformers itself depends on is left to pip.
PINNED = ("torch", "safetensors", "accelerate", "peft")
TOGETHER = ("accelerate", "peft", "pytest", "hypothesis")


def main() -> int:
    """Run the tests in each environment and return 0 if all rows are green."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="*", default=VERSIONS, help="releases of transformers")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-matrix")
    arguments = parser.parse_args()
    results: dict[str, dict[str, Counter[str]]] = {}
    for version in arguments.versions:
        python = environment(arguments.environments / f"transformers-{version}", version)
        found = installed(python)
        label = f"{found} (newest)" if version == "newest" else found
        if any(name.split()[0] == found for name in results):
            results[label] = next(rows for name, rows in results.items() if name.split()[0] == found)
            continue
        results[label] = run(python, arguments.environments / f"transformers-{version}.xml")
        print_line(f"{label}: {total(results[label])}")
    print_line(table(results))
    return 0 if all(is_green(rows) for rows in results.values()) else 1


def environment(folder: Path, version: str) -> Path:
    """Return the interpreter of the environment in `folder`, made if there is none."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if python.exists() and (folder / "ready").exists():
        return python
    print_line(f"making an environment for transformers {version} in {folder}")
    venv.create(folder, with_pip=True, clear=True)
    constraints = folder / "constraints.txt"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("#")[0].split(";")[0].strip() for line in lines]
    constraints.write_text("\n".join(pin for pin in pins if re.split("==", pin)[0] in PINNED))
    wanted = "transformers" if version == "newest" else f"transformers=={version}"
    pip = [
        str(python),
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--quiet",
        "-c",
        str(constraints),
    ]
    subprocess.run([*pip, wanted, *TOGETHER, "-e", str(ROOT)], check=True)
    (folder / "ready").touch()
    return python


def installed(python: Path) -> str:
    """Return the version of transformers that `python` imports."""
    code = "from importlib.metadata import version; print(version('transformers'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def run(python: Path, report: Path) -> dict[str, Counter[str]]:
    """Run the tests and return the outcomes of each row."""
    report.unlink(missing_ok=True)
    # Older versions warn about their own dependencies: only the newest runs with warnings as errors, in `make test`.
    options = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default", f"--junitxml={report}"]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(python), "-m", "pytest", str(TESTS), *options]
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, check=False)
    if not report.exists():
        raise SystemExit(f"pytest did not run in {python}:\n{done.stdout}{done.stderr}")
    if done.returncode:
        print_line(
            "\n".join(line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR")))
        )
    return outcomes(report)


def outcomes(report: Path) -> dict[str, Counter[str]]:
    """Return passed, failed and skipped by row (the classes of the tests, in their order)."""
    rows: dict[str, Counter[str]] = {row: Counter() for row in row_labels()}
    labels = {name: label for label, name in row_labels().items()}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        rows[labels[case.attrib["classname"].rpartition(".")[2]]][outcome] += 1
    return rows


def row_labels() -> dict[str, str]:
    """Return the name of the test class of each row, by the first line of its docstring."""
    found = re.findall(r'^class (Test\w+):\n    """(.+)"""', TESTS.read_text(), flags=re.MULTILINE)
    return {label: name for name, label in found}


def is_green(rows: dict[str, Counter[str]]) -> bool:
    """Whether nothing failed and something passed."""
    return not any(row["failed"] for row in rows.values()) and any(row["passed"] for row in rows.values())


def cell(row: Counter[str]) -> str:
    """Return what the table says of a row in one version."""
    if row["failed"]:
        return f"FAILED {row['failed']}/{row.total()}"
    if not row["passed"]:
        return "does not apply"
    return f"ok {row['passed']}" + (f" (-{row['skipped']})" if row["skipped"] else "")


def total(rows: dict[str, Counter[str]]) -> str:
    """Return the sums over all rows in words."""
    sums = sum(rows.values(), Counter())
    return ", ".join(f"{sums[kind]} {kind}" for kind in ("passed", "failed", "skipped"))


def table(results: dict[str, dict[str, Counter[str]]]) -> str:
    """Return versions x rows as a Markdown table: tests passed, and in brackets those that do not apply."""
    lines = [["transformers", *results], ["---"] * (len(results) + 1)]
    for row in row_labels():
        lines.append([row, *(cell(rows[row]) for rows in results.values())])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def print_line(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
