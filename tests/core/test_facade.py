"""The old import paths: names that published snippets star-import."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hqq
import hqq.core.optimize
import hqq.core.quantize as facade
from hqq.core.config import hqq_base_quant_config
from hqq.errors import (
    CheckpointExistsError,
    ConfigError,
    CorruptCheckpointError,
    DtypeError,
    HQQError,
    MissingKeysError,
    NotQuantizedError,
    ShapeError,
    WeightError,
)


def test_star_import_gives_the_originals_names() -> None:
    names: dict[str, object] = {}
    code = compile("from hqq.core.quantize import *", "snippet", "exec")
    exec(code, names)  # noqa: S102 - a star import is only allowed at module level
    expected = {
        "Quantizer",
        "HQQLinear",
        "HQQBackend",
        "BaseQuantizeConfig",
        "hqq_base_quant_config",
        "BitPack",
    }
    assert expected | {"torch", "nn", "Tensor"} <= set(names)
    assert names["BaseQuantizeConfig"] is hqq_base_quant_config
    assert set(facade.__all__) <= set(names)


def test_public_names_resolve_lazily() -> None:
    for name in hqq.__all__:
        assert getattr(hqq, name) is not None
    assert set(dir(hqq)) >= set(hqq.__all__)
    with pytest.raises(AttributeError, match="module 'hqq' has no attribute 'nothing'"):
        hqq.nothing  # noqa: B018
    code = (
        "import sys, hqq; assert not [m for m in sys.modules if m.startswith('hqq.')]; assert hqq.__version__"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (ConfigError, ValueError),
        (WeightError, ValueError),
        (ShapeError, ValueError),
        (DtypeError, TypeError),
        (NotQuantizedError, RuntimeError),
        (MissingKeysError, KeyError),
        (CorruptCheckpointError, ValueError),
        (CheckpointExistsError, FileExistsError),
    ],
)
def test_errors_are_builtin_ones_too(error: type[HQQError], builtin: type[Exception]) -> None:
    assert issubclass(error, builtin)
    assert issubclass(error, HQQError)
    assert str(error("got this; expected that")) == "got this; expected that"
