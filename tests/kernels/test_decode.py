"""The kernels of a decoding step against the same formulas in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# float16 and bfloat16 round results that transformers rounds too; every intermediate may be off by one unit.
EPS = {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every output a kernel was given to fill, poisoned with NaN beforehand."""
    from hqq.kernels import decode_launch

    made: list[Tensor] = []
    allocate: Callable[..., Tensor] = decode_launch.new_output

    def poisoned(*args: object) -> Tensor:
        made.append(allocate(*args).fill_(float("nan")))
        return made[-1]

    monkeypatch.setattr(decode_launch, "new_output", poisoned)
    return made


def random(rng: torch.Generator, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, generator=rng).to(device, dtype)


def close(got: Tensor, expected: Tensor, units: float) -> None:
    """Assert that `got` is within `units` roundings of the largest expected value of each row."""
    bound = units * EPS[got.dtype] * expected.abs().amax(-1, keepdim=True)
    assert ((got.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "K"), [(1, 64), (3, 100), (64, 257), (2, 4096)])
def test_add_norm(
    rows: int, K: int, dtype: torch.dtype, rng: torch.Generator, device: torch.device, outputs: list[Tensor]
) -> None:
    from hqq.kernels.decode_norm import add_norm

    hidden, delta = (random(rng, rows, K, dtype=dtype, device=device) for _ in range(2))
    weight = random(rng, K, dtype=dtype, device=device)
    for added in (delta, None):
        given = hidden.clone()
        total = hidden if added is None else hidden + added
        got = add_norm(given, added, weight, 1e-5)
        assert torch.equal(given, total)
        x = total.double()
        expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        close(got, expected, 4)
    assert len(outputs) == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "N"), [(1, 96), (64, 33), (2, 1030)])
def test_silu_mul(
    rows: int, N: int, dtype: torch.dtype, rng: torch.Generator, device: torch.device, outputs: list[Tensor]
) -> None:
    from hqq.kernels.decode_mlp import silu_mul

    joined = random(rng, rows, 2 * N, dtype=dtype, device=device) * 4
    gate, up = joined.split(N, dim=-1)
    got = silu_mul(gate, up)
    close(got, F.silu(gate.double()) * up.double(), 4)
    assert outputs


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


class Attention:
    """Random arguments of `decode_attention`, and what it should give, row by row in fp64."""

    def __init__(
        self,
        rng: torch.Generator,
        device: torch.device,
        dtype: torch.dtype,
        heads: tuple[int, int, int],
        spans: list[tuple[int, int]],
        length: int,
        norm: bool,
        window: int | None,
    ) -> None:
        from hqq.kernels.decode_attention import HeadNorm

        self.kv, self.group, self.head = heads
        rows = len(spans)
        sizes = (self.kv * self.group * self.head, self.kv * self.head, self.kv * self.head)
        joined = random(rng, rows, sum(sizes), dtype=dtype, device=device)
        self.q, self.k, self.v = joined.split(sizes, dim=-1)
        shape = (rows, self.kv, length, self.head)
        self.keys, self.values = (random(rng, *shape, dtype=dtype, device=device) for _ in range(2))
        turn = torch.rand(length, self.head // 2, generator=rng).repeat(1, 2) * 6.28
        self.cos, self.sin = (f(turn).to(device, dtype) for f in (torch.cos, torch.sin))
        self.spans, self.window = spans, window
        self.begins, self.positions = (
            torch.tensor([span[i] for span in spans], dtype=torch.int32, device=device) for i in range(2)
        )
        weights = [1 + random(rng, self.head, dtype=dtype, device=device) / 4 for _ in range(2)]
        self.norm = HeadNorm(weights[0], weights[1], 1e-6) if norm else None
        # What lies outside of a row's span must not matter, whatever it is.
        for row, (begin, position) in enumerate(spans):
            for cache in (self.keys, self.values):
                cache[row, :, :begin] = float("nan")
                cache[row, :, position:] = float("nan")

    def run(self, splits: int) -> Tensor:
        from hqq.kernels.decode_attention import AttentionSpace, decode_attention

        rows = len(self.spans)
        space = AttentionSpace(
            torch.full((rows, self.kv, splits, self.group, self.head), float("nan"), device=self.q.device),
            torch.full((rows, self.kv, splits, self.group, 2), float("nan"), device=self.q.device),
        )
        return decode_attention(
            self.q,
            self.k,
            self.v,
            self.keys,
            self.values,
            self.cos,
            self.sin,
            self.begins,
            self.positions,
            self.head**-0.5,
            space,
            self.norm,
            self.window,
        )

    def heads(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the new query heads [KV, G, D], key and value heads [KV, D].

        Rounded as transformers rounds them: with other roundings, scores would be others.
        """
        begin, position = self.spans[row]
        cos, sin = self.cos[position - begin], self.sin[position - begin]
        q = self.q[row].view(self.kv, self.group, self.head)
        k, v = (x[row].view(self.kv, self.head) for x in (self.k, self.v))
        if self.norm is not None:
            q, k = normed(q, self.norm.q, self.norm.eps), normed(k, self.norm.k, self.norm.eps)
        return rotated(q, cos, sin).double(), rotated(k, cos, sin).double(), v.double()

    def expected(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the result, and the key and value that go into the cache."""
        begin, position = self.spans[row]
        q, k, v = self.heads(row)
        low = begin if self.window is None else max(begin, position - self.window + 1)
        keys = torch.cat((self.keys[row, :, low:position].double(), k[:, None]), dim=1)
        values = torch.cat((self.values[row, :, low:position].double(), v[:, None]), dim=1)
        p = (q @ keys.transpose(1, 2) * self.head**-0.5).softmax(-1)
        return (p @ values).flatten(), k, v


CASES = {
    "llama3": ((2, 4, 128), [(0, 200)], None, False),
    "shipped": ((2, 2, 64), [(0, 5), (3, 70), (64, 64), (0, 0)], None, False),
    "many heads": ((4, 1, 32), [(1, 130), (5, 260)], None, False),
    "head of 80, qwen3 norms": ((1, 8, 80), [(2, 190)], None, True),
    "odd group": ((2, 7, 48), [(0, 64), (0, 128), (10, 129)], None, True),
    "window": ((2, 2, 16), [(0, 200), (100, 110), (0, 3)], 70, False),
    "window of one": ((1, 2, 16), [(0, 40)], 1, False),
}


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(
    case: str,
    dtype: torch.dtype,
    splits: int,
    rng: torch.Generator,
    device: torch.device,
    outputs: list[Tensor],
) -> None:
    heads, spans, window, norm = CASES[case]
    made = Attention(rng, device, dtype, heads, spans, 300, norm, window)
    before = [cache.clone() for cache in (made.keys, made.values)]
    got = made.run(splits)
    again = made.run(splits)
    assert torch.equal(got, again)
    assert len(outputs) == 2
    for row, (_, position) in enumerate(spans):
        expected, k, v = made.expected(row)
        # Weights and result are rounded once each; in float32 a score of some units moves its exponential.
        close(got[row], expected, 16 if dtype == torch.float32 else 4)
        # The norm may round one way or the other.
        close(made.keys[row, :, position], k, 3 if norm else 1)
        assert torch.equal(made.values[row, :, position].double(), v)
        for cache, old in zip((made.keys, made.values), before, strict=True):
            old[row, :, position] = cache[row, :, position]
    for cache, old in zip((made.keys, made.values), before, strict=True):
        assert torch.equal(cache.nan_to_num(7.0), old.nan_to_num(7.0)), "nothing else in the cache changes"


def test_attention_stays_within_the_cache(rng: torch.Generator, device: torch.device) -> None:
    heads, length = (1, 2, 16), 65
    made = Attention(rng, device, torch.float32, heads, [(0, 64), (0, 64)], length, False, None)
    made.positions += 200
    before = made.keys.clone()
    made.run(2)
    assert torch.equal(made.keys[:, :, :64], before[:, :, :64])
    assert made.keys[:, :, 64].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "V"), [(1, 50), (5, 2051), (64, 1024)])
def test_the_likeliest_token(
    rows: int, V: int, dtype: torch.dtype, rng: torch.Generator, device: torch.device
) -> None:
    from hqq.kernels.decode_advance import Rows
    from hqq.kernels.decode_choose import ChoiceSpace, choose_next
    from hqq.kernels.decode_logits import Filters

    space = ChoiceSpace.make(rows, V, device)
    # Few values: ties in most rows.
    logits = torch.randint(-40, 9, (rows, V), generator=rng).to(device, dtype)
    best = [row.index(max(row)) for row in logits.tolist()]
    ends = torch.tensor([best[0], V + 3], device=device)
    finished = (torch.rand(rows, generator=rng) < 0.3).to(device)
    over = finished.tolist()
    token = torch.full((rows, 1), -7, device=device)
    ids = torch.full((rows, 12), -1, device=device)
    positions = torch.randint(0, 10, (rows,), generator=rng, dtype=torch.int32).to(device)
    places = positions.tolist()
    for step in range(2):
        rows_of_it = Rows(token, finished, ids, positions, ends, V + 1)
        choose_next(logits, rows_of_it, Filters(), None, None, space)
        expected = [V + 1 if done else index for done, index in zip(over, best, strict=True)]
        assert token[:, 0].tolist() == expected
        places = [place + 1 for place in places]
        assert positions.tolist() == places
        assert [ids[row, place].item() for row, place in enumerate(places)] == expected
        over = [done or value in (best[0], V + 3) for done, value in zip(over, expected, strict=True)]
        assert finished.tolist() == over
        assert (ids >= 0).sum() == rows * (step + 1)
    assert not space.arrived.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "norm"), [((2, 2, 16), False), ((1, 3, 80), True)], ids=str)
def test_prompt_heads(
    heads: tuple[int, int, int],
    norm: bool,
    dtype: torch.dtype,
    rng: torch.Generator,
    device: torch.device,
    outputs: list[Tensor],
) -> None:
    from hqq.kernels.decode_prompt import prompt_heads

    kv, _, head = heads
    tokens, length, begins = 6, 9, [0, 2]
    # One row of arguments for each token, as the attention of a single token has them.
    spans = [(begin, max(place, begin)) for begin in begins for place in range(tokens)]
    made = Attention(rng, device, dtype, heads, spans, length, norm, None)
    keys, values = (
        torch.full((2, kv, length, head), float("nan"), device=device, dtype=dtype) for _ in range(2)
    )
    start = torch.tensor(begins, dtype=torch.int32, device=device)
    got = prompt_heads(made.q, made.k, made.v, keys, values, made.cos, made.sin, start, made.norm)
    assert len(outputs) == 1
    for index, (row, place) in enumerate((row, place) for row in range(2) for place in range(tokens)):
        q, k, v = made.heads(index)
        close(got[index].view_as(q), q, 3 if norm else 1)
        close(keys[row, :, place], k, 3 if norm else 1)
        assert torch.equal(values[row, :, place].double(), v)
    assert keys[:, :, tokens:].isnan().all()
    assert values[:, :, tokens:].isnan().all()
