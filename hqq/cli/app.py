"""From arguments to an exit status: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TextIO

from hqq.cli.output import Output
from hqq.cli.parser import build_parser
from hqq.errors import HQQError

OK, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return its exit status.

    0 is success, 1 a failure with one line on stderr, 2 a usage error, 130 an interruption by Ctrl-C.
    """
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse ends the process itself, after --help or a usage error
        return stop.code if isinstance(stop.code, int) else USAGE
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            # Imported here: `hqq --help` needs no torch.
            run: Callable[..., Output] = import_module(f"hqq.cli.{args.command}").run
            output = run(args)
        print(output.as_json() if args.json else output.text, flush=True)
    except (HQQError, OSError) as error:
        return _fail(error, args.debug)
    except RuntimeError as error:
        if not type(error).__module__.startswith("torch"):
            raise
        return _fail(error, args.debug)  # the machine's limits: out of memory, no such device
    except KeyboardInterrupt:
        print("hqq: interrupted", file=sys.stderr)
        return INTERRUPTED
    return OK


def _fail(error: Exception, debug: bool) -> int:
    if isinstance(error, BrokenPipeError):
        # Whoever read stdout has gone: nothing to report, and the interpreter must not try to flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    if debug:
        traceback.print_exception(error)
    else:
        print(f"hqq: {_one_line(error)}", file=sys.stderr)
    return FAILURE


def _one_line(error: Exception) -> str:
    """Return the message on one line; what the operating system reports comes with the path."""
    if isinstance(error, OSError) and error.strerror and not isinstance(error, HQQError):
        where = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror}{where}"
    return " ".join(str(error).split()) or type(error).__name__


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"hqq: warning: {' '.join(str(message).split())}", file=sys.stderr)
