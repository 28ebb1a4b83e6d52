"""The command line's arguments. Imports neither torch nor transformers, so that `--help` is quick."""

from __future__ import annotations

import argparse

from hqq import __version__

DTYPES = ("auto", "float32", "float16", "bfloat16")
FORMATS = ("safetensors", "pt")

_MODEL_HELP = "folder or hub id of a model or of a quantised checkpoint"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `hqq`; its result has the name of the command's module in `command`."""
    parser = argparse.ArgumentParser(
        prog="hqq",
        description="Half-Quadratic Quantization: quantise models at 8 to 1 bits, without calibration data.",
    )
    parser.add_argument("--version", action="version", version=f"hqq {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_quantize, _add_inspect, _add_eval, _add_generate, _add_convert, _add_tune, _add_doctor):
        _add_common(add(commands))
    return parser


_Commands = argparse._SubParsersAction  # argparse has no public name for what add_subparsers returns


def _command(
    commands: _Commands[argparse.ArgumentParser], name: str, module: str, text: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text[0].lower() + text[1:].partition(".")[0], description=text)
    command.set_defaults(command=module)
    return command


def _add_common(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    group.add_argument("--quiet", action="store_true", help="no progress bars")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_quantize(commands: _Commands[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    command = _command(
        commands,
        "quantize",
        "quantize",
        "Quantise a model. Writes a complete folder: weights, configuration and tokenizer.",
    )
    command.add_argument("model", metavar="MODEL", help="folder or hub id of the model")
    command.add_argument("out", metavar="OUT", help="folder to write")
    how = command.add_argument_group("quantisation")
    how.add_argument(
        "--nbits", type=_bits, default=4, help="bits per weight: 8, 6, 5, 4, 3, 2, 1.58, 1 (default 4)"
    )
    how.add_argument(
        "--group-size",
        type=_group_size,
        default=64,
        metavar="N",
        help="weights per scale, or 'none' for whole channels (default 64)",
    )
    how.add_argument(
        "--axis", type=int, default=1, help="1 groups along the inputs (default), 0 along the outputs"
    )
    how.add_argument("--solver", help="how scales and zeros are found (default: the best there is)")
    how.add_argument(
        "--config",
        metavar="JSON",
        help='settings per layer, inline or in a file: {tag or glob: {"nbits": 3, "group_size": 32} or null}; '
        "layers it does not name are left as they are, settings it does not name come from the options above",
    )
    how.add_argument(
        "--skip",
        action="append",
        metavar="PATTERN",
        help="layer name, tag or glob to leave as it is (repeatable)",
    )
    how.add_argument("--embeddings", action="store_true", help="quantise embeddings too")
    how.add_argument("--lm-head", action="store_true", help="quantise the output layer too")
    _add_calibration(command)
    _add_placement(command)
    _add_target(command, default="safetensors")
    return command


def _add_calibration(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("calibration")
    group.add_argument(
        "--calibration",
        metavar="SOURCE",
        help="fit layers to the inputs they see: 'self' for text that the model writes, 'random' for random tokens, "
        "or a file of text, UTF-8 (default: none, which needs no data)",
    )
    group.add_argument(
        "--sequences", type=int, metavar="N", help="sequences to calibrate with (default: at least 40)"
    )
    group.add_argument(
        "--length", type=int, metavar="N", help="tokens in a sequence (default: 512, or the model's context)"
    )
    group.add_argument(
        "--work-folder",
        metavar="DIR",
        help="keeps finished blocks, so that an interrupted run goes on from there",
    )


def _add_inspect(commands: _Commands[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    text = "Show what a quantised checkpoint holds. One row per layer, then totals."
    command = _command(commands, "inspect", "inspection", text)
    command.add_argument("path", metavar="PATH", help="folder or hub id of the checkpoint")
    command.add_argument(
        "--reference",
        metavar="MODEL",
        help="the original model: adds the error of each layer, relative to the norm of the original weight",
    )
    return command


def _add_eval(commands: _Commands[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    text = "Measure perplexity on a text file. Lower is better; the same file must be used to compare."
    command = _command(commands, "eval", "evaluation", text)
    command.add_argument("path", metavar="PATH", help=_MODEL_HELP)
    command.add_argument("--text", required=True, metavar="FILE", help="text to predict, UTF-8")
    command.add_argument(
        "--window", type=int, metavar="N", help="tokens of context (default: the model's, at most 2048)"
    )
    command.add_argument(
        "--stride", type=int, metavar="N", help="tokens between windows (default: half a window)"
    )
    command.add_argument("--batch-size", type=int, metavar="N", help="windows at once (default: up to 8)")
    command.add_argument("--max-tokens", type=int, metavar="N", help="only the beginning of the text")
    _add_placement(command)
    return command


def _add_generate(commands: _Commands[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    text = "Continue a prompt. Greedy unless a temperature is given."
    command = _command(commands, "generate", "generation", text)
    command.add_argument("path", metavar="PATH", help=_MODEL_HELP)
    command.add_argument("--prompt", required=True, help="text to continue")
    command.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    command.add_argument("--temperature", type=float, default=0.0, help="above 0 samples (default 0)")
    command.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens")
    command.add_argument(
        "--top-p", type=float, metavar="P", help="sample among the likeliest tokens of this probability"
    )
    command.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1 avoids repetition")
    command.add_argument("--seed", type=int, help="of the sampling")
    _add_placement(command)
    return command


def _add_convert(commands: _Commands[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    text = "Rewrite a quantised checkpoint in the other format. The weights stay the same to the bit."
    command = _command(commands, "convert", "conversion", text)
    command.add_argument("source", metavar="SRC", help="folder or hub id of the checkpoint")
    command.add_argument("out", metavar="DST", help="folder to write")
    _add_target(command, default=None)
    return command


def _add_tune(commands: _Commands[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    text = (
        "Measure the fused kernels for a checkpoint's layers on this GPU. The fastest settings are kept on disk and "
        "used from then on."
    )
    command = _command(commands, "tune", "tuning", text)
    command.add_argument("path", metavar="PATH", help="folder or hub id of the quantised checkpoint")
    command.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 8], metavar="M", help="tokens at a time (default 1 8)"
    )
    command.add_argument(
        "--shape",
        type=_shape,
        action="append",
        metavar="NxK",
        help="further outputs x inputs, such as those of joined projections (repeatable)",
    )
    command.add_argument(
        "--dtype", choices=("auto", "float16", "bfloat16"), default="auto", help="default auto: bfloat16"
    )
    command.add_argument("--device", help="such as cuda:1 (default: the current GPU)")
    return command


def _add_doctor(commands: _Commands[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    text = (
        "Say what works on this machine. Libraries and their versions, devices, backends and why others fail."
    )
    return _command(commands, "doctor", "doctor", text)


def _add_placement(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("placement")
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="to compute in (default auto: the model's own)"
    )
    group.add_argument("--device", help="such as cpu, cuda or cuda:1 (default: a GPU if there is one)")


def _add_target(command: argparse.ArgumentParser, default: str | None) -> None:
    group = command.add_argument_group("target")
    group.add_argument(
        "--format",
        choices=FORMATS,
        required=not default,
        default=default,
        help=f"default {default}" if default else None,
    )
    group.add_argument("--overwrite", action="store_true", help="replace what is there")


def _shape(text: str) -> tuple[int, int]:
    try:
        N, K = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected outputs x inputs, such as 28672x4096"
        ) from None
    return N, K


def _bits(text: str) -> float:
    """Return an int where the number is whole: bits are 4 or 1.58."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a number such as 4 or 1.58") from None
    return int(value) if value.is_integer() else value


def _group_size(text: str) -> int | None:
    try:
        return None if text.lower() == "none" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number, or none") from None
