"""Loading and launching CUDA C++ kernels: streams, threads, graphs, several GPUs, and what the driver refuses."""

from __future__ import annotations

import struct
import threading

import pytest
import torch
from torch import Tensor

from hqq.errors import KernelError
from hqq.kernels.cuda import Kernel, module, prepare_all, unavailable_reason
from hqq.kernels.cuda.source import FOLDER, Source

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason())),
]

TEXT = """#include "ptx.cuh"
extern "C" __global__ void scale(float* y, const float* x, long long n, int add, float factor) {
    pdl_wait();
    const long long i = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
    if (i < n) y[i] = x[i] * factor + add + VALUE;
    pdl_launch();
}
extern "C" __global__ void reverse(float* y, const float* x, int n) {
    HQQ_DYNAMIC_SHARED(shared);
    float* values = reinterpret_cast<float*>(shared);
    for (int i = threadIdx.x; i < n; i += blockDim.x) values[i] = x[i];
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = values[n - 1 - i];
}
extern "C" __global__ void rank(int* out) {
    unsigned own;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(own));
    if (threadIdx.x == 0) out[blockIdx.x] = own;
}
"""


def kernel(name: str, signature: str, value: int = 0) -> Kernel:
    """Return a kernel that nothing is loaded of yet; another `value` is another compilation."""
    source = Source("launching.cu", TEXT, (("ptx.cuh", (FOLDER / "ptx.cuh").read_text()),))
    return Kernel(source, name, signature, {"VALUE": value})


def scale(
    made: Kernel, x: Tensor, add: int, factor: float, *, pdl: bool = False, out: Tensor | None = None
) -> Tensor:
    y = torch.full_like(x, float("nan")) if out is None else out
    grid = (-(-x.numel() // 256), 1, 1)
    args = (y.data_ptr(), x.data_ptr(), x.numel(), add, factor)
    made.launch(x.device.index, grid, (256, 1, 1), args, pdl=pdl)
    return y


def random(rng: torch.Generator, n: int, device: int = 0) -> Tensor:
    # Small integers: what the kernels make of them is exact.
    return torch.randint(-99, 99, (n,), generator=rng).float().to(f"cuda:{device}")


def test_arguments_of_every_type(rng: torch.Generator) -> None:
    x = random(rng, 100_003)
    assert torch.equal(scale(kernel("scale", "PPqif", 7), x, -3, 0.5), x * 0.5 + 4)


def test_current_stream_is_used(rng: torch.Generator) -> None:
    x, stream = random(rng, 1 << 20), torch.cuda.Stream()
    made = kernel("scale", "PPqif")
    made.prepare(0)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        y = scale(made, x, 1, 1.0)
        assert not stream.query()
    stream.synchronize()
    assert torch.equal(y, x + 1)


def test_kernels_that_overlap_keep_their_order(rng: torch.Generator) -> None:
    x = random(rng, 1 << 20)
    made = kernel("scale", "PPqif")
    y, z = x.clone(), x.clone()
    for _ in range(50):
        scale(made, y, 1, 1.0, pdl=True, out=z)
        scale(made, z, -1, 1.0, pdl=True, out=y)
    assert torch.equal(y, x) and torch.equal(z, x + 1)


def test_first_launch_within_a_graph(rng: torch.Generator) -> None:
    n = 50_000  # more shared memory than a kernel has without asking
    x = random(rng, n)
    y = torch.zeros_like(x)
    made = kernel("reverse", "PPi", 11)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for pdl in (False, True):
            made.launch(0, (1, 1, 1), (256, 1, 1), (y.data_ptr(), x.data_ptr(), n), shared=4 * n, pdl=pdl)
    assert not y.any()
    graph.replay()
    assert torch.equal(y, x.flip(0))


def test_threads_do_not_mix_their_arguments(rng: torch.Generator) -> None:
    made = kernel("scale", "PPqif")
    wrong: list[int] = []

    def work(own: int) -> None:
        x = torch.full((1000,), float(own), device="cuda")
        for i in range(200):
            y = scale(made, x, i, 3.0)
            if i % 40 == 0 and not torch.equal(y, 3 * x + i):
                wrong.append(own)

    threads = [threading.Thread(target=work, args=(own,)) for own in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_thread_that_has_done_nothing_on_the_gpu(rng: torch.Generator) -> None:
    x, y = random(rng, 999), torch.empty(999, device="cuda")
    loaded, new = kernel("scale", "PPqif"), kernel("scale", "PPqif", 23)
    loaded.prepare(0)
    for made, value in ((loaded, 0), (new, 23)):
        thread = threading.Thread(target=scale, args=(made, x, 1, 1.0), kwargs={"out": y})
        thread.start()
        thread.join()
        assert torch.equal(y, x + 1 + value)


def test_new_thread_that_needs_much_shared_memory(rng: torch.Generator) -> None:
    x, y = random(rng, 20_000), torch.empty(20_000, device="cuda")
    made = kernel("reverse", "PPi")
    made.prepare(0)
    args = (0, (1, 1, 1), (256, 1, 1), (y.data_ptr(), x.data_ptr(), x.numel()))
    thread = threading.Thread(target=made.launch, args=args, kwargs={"shared": 80_000})
    thread.start()
    thread.join()
    assert torch.equal(y, x.flip(0))


def test_clusters() -> None:
    out = torch.full((8,), -1, dtype=torch.int32, device="cuda")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters need compute capability 9.0")
    kernel("rank", "P").launch(0, (8, 1, 1), (32, 1, 1), (out.data_ptr(),), cluster=(4, 1, 1))
    assert out.tolist() == [0, 1, 2, 3] * 2


def test_many_kernels_at_once(rng: torch.Generator) -> None:
    x = random(rng, 100)
    made = [kernel("scale", "PPqif", value) for value in range(100, 108)]
    prepare_all(made, 0)
    for value, one in enumerate(made, 100):
        assert torch.equal(scale(one, x, 0, 1.0), x + value)


def test_resources() -> None:
    made = kernel("reverse", "PPi")
    found = made.resources(0)
    assert 0 < found.registers < 64 and found.local_bytes == found.static_shared == 0
    assert made.blocks_per_multiprocessor(0, 256, 100 << 10) == 2


@pytest.mark.parametrize(
    ("block", "shared", "why"), [(2048, 0, "launching reverse"), (32, 1 << 20, "bytes of shared memory")]
)
def test_refused_launch_is_an_error(block: int, shared: int, why: str) -> None:
    x = torch.zeros(4, device="cuda")
    with pytest.raises(KernelError, match=why):
        kernel("reverse", "PPi").launch(
            0, (1, 1, 1), (block, 1, 1), (x.data_ptr(), x.data_ptr(), 4), shared=shared
        )


def test_unknown_kernel_is_an_error() -> None:
    with pytest.raises(KernelError, match="looking up missing"):
        kernel("missing", "P").prepare(0)


def test_wrong_number_of_arguments_is_an_error() -> None:
    with pytest.raises(struct.error, match="pack_into expected 2 items"):
        kernel("reverse", "Pi").launch(0, (1, 1, 1), (32, 1, 1), (0,))


def test_other_device_than_the_current_one(rng: torch.Generator) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    made = kernel("scale", "PPqif", 41)
    for device in (1, 0, 1):
        x = random(rng, 1 << 20, device)
        assert torch.equal(scale(made, x, 1, 2.0), 2 * x + 42)
    assert torch.cuda.current_device() == 0


def test_driver_older_than_the_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "nvrtc_version", lambda: (99, 0))
    module._driver_reason.cache_clear()
    try:
        assert "makes code for later ones" in str(unavailable_reason())
    finally:
        module._driver_reason.cache_clear()


def test_tensor_elsewhere_is_a_reason() -> None:
    assert unavailable_reason(torch.device("cuda", 0)) is None
    assert "take CUDA tensors" in str(unavailable_reason(torch.device("cpu")))
