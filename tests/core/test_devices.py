"""Names of dtypes and devices."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from hqq.core.devices import resolve_device
from hqq.core.dtypes import COMPUTE_DTYPES, check_compute_dtype, dtype_from_name
from hqq.errors import DeviceFallbackWarning, DtypeError


@pytest.mark.parametrize("dtype", [*COMPUTE_DTYPES, torch.uint8, torch.int32, torch.int64], ids=str)
def test_dtype_names(dtype: torch.dtype) -> None:
    assert dtype_from_name(str(dtype)) is dtype
    assert dtype_from_name(str(dtype).removeprefix("torch.")) is dtype


@pytest.mark.parametrize(
    "name", ["", "torch.", "float17", "torch.nn", "torch.load", "torch.float16 ", "os.system('x')"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(DtypeError, match=r"got dtype name .*; expected one of torch\.bfloat16"):
        dtype_from_name(name)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_dtypes_that_do_not_compute(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"got compute_dtype={dtype}; expected one of"):
        check_compute_dtype(dtype)


def test_devices_that_exist_are_kept() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_device("cpu") == torch.device("cpu")
        assert resolve_device(torch.device("meta")) == torch.device("meta")
        assert resolve_device(None, torch.device("meta")) == torch.device("meta")
        assert resolve_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", 0, 2, torch.device("cuda")])
def test_cuda_falls_back_with_a_warning(device: str | int | torch.device) -> None:
    with pytest.warns(DeviceFallbackWarning, match=r"got device='cuda.*no usable CUDA device; using the CPU"):
        assert resolve_device(device) == torch.device("cpu")


def test_the_import_path_of_transformers_is_light() -> None:
    """transformers imports hqq.core.quantize from its own cache module: no compiler, no model library, no context."""
    code = (
        "import sys, torch; import hqq.core.quantize; heavy = [m for m in ('torch._dynamo', 'torch._inductor', "
        "'transformers', 'accelerate', 'triton') if m in sys.modules]; "
        "assert not heavy, heavy; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
