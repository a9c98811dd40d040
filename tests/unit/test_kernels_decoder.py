"""The decoder's kernels against their twins: through Triton's interpreter on a CPU, for real on a GPU."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from flashspec.kernels import TRITON_AVAILABLE
from flashspec.kernels import reference_decoder as twin
from flashspec.kernels.decoding import InBytes

if not TRITON_AVAILABLE:
    pytest.skip("Triton is not installed", allow_module_level=True)

from flashspec.kernels import attention, elementwise, linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bfloat16 tiles as if their bits were integers.
DTYPES = [torch.float32, torch.float16 if DEVICE == "cpu" else torch.bfloat16]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def whole(weight: InBytes) -> Tensor:
    """What it stands for."""
    return weight.values * weight.scales[:, None] * weight.columns


def assert_near(actual: Tensor, expected: Tensor, most: float = 2e-6) -> None:
    """most: relative error of float32."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < (most if actual.dtype == torch.float32 else 6e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "outputs", "depth"), [(1, 48, 64), (5, 40, 96), (16, 33, 80), (20, 16, 192)])
def test_projections_equal_their_twins(tokens: int, outputs: int, depth: int, dtype: torch.dtype) -> None:
    x, weight = normal(tokens, depth, dtype=dtype), normal(outputs, depth, dtype=dtype, scale=0.1)
    squares, bias = normal(tokens, 3).square(), normal(outputs, dtype=dtype)
    assert_near(linear.project(x, weight, None, None, 0.0, dtype), twin.project(x, weight, None, None, 0.0, dtype))
    for out in (dtype, torch.float32):
        expected = twin.project(x.float(), weight.float(), bias.float(), squares, 1e-5, torch.float32)
        assert_near(linear.project(x, weight, bias, squares, 1e-5, out), expected.to(out))
    halves = normal(2 * outputs, depth, dtype=dtype, scale=0.3)
    expected = twin.project_gated(x.float(), halves.float(), squares, 1e-5)
    assert_near(linear.project_gated(x, halves, squares, 1e-5), expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "outputs", "depth"), [(1, 48, 64), (5, 40, 96), (20, 33, 192), (64, 16, 128)])
def test_weights_in_eight_bits_are_multiplied_as_what_they_stand_for(
    tokens: int, outputs: int, depth: int, dtype: torch.dtype
) -> None:
    x, squares = normal(tokens, depth, dtype=dtype), normal(tokens, 3).square()
    x[0] *= 10
    bias, hidden = normal(outputs, dtype=dtype), normal(tokens, outputs, dtype=dtype)
    norm, spread = normal(outputs, dtype=dtype), normal(2 * outputs, 1).exp()  # rows of many sizes
    both = InBytes.of(normal(2 * outputs, depth, scale=0.02) * spread)
    weight = InBytes.of(normal(outputs, depth, scale=0.1) * spread[:outputs])
    most = 2e-5  # one input of a thousand may be rounded the other way, half a step of sixteen bits away
    found = linear.project(x, weight, bias, squares, 1e-5, torch.float32)
    assert_near(found, twin.project(x, weight, bias, squares, 1e-5, torch.float32), most)
    full = twin.project(x.float(), whole(weight), bias.float(), squares, 1e-5, torch.float32)
    assert (found - full).norm() < 2e-4 * full.norm()  # inputs in sixteen bits
    assert_near(linear.project_gated(x, both, squares, 1e-5), twin.project_gated(x, both, squares, 1e-5), most)
    ours = linear.project_add(x, weight, bias, hidden, norm)
    theirs = twin.project_add(x, weight, bias, hidden, norm)
    for a, b in zip(ours[:2], theirs, strict=False):
        assert_near(a, b, most)
    assert_near(ours[2].sum(1), ours[0].float().square().sum(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_in_two_bytes_are_within_half_a_step(dtype: torch.dtype) -> None:
    x = normal(6, 45, dtype=dtype) * torch.tensor([1, 1e-3, 0, 30, 1, 1], device=DEVICE)[:, None].to(dtype)
    columns = normal(45).exp().bfloat16()
    product = x.double() * columns.double()
    for found, scales in (elementwise.round_to_bytes(x, columns), twin.round_to_bytes(x, columns)):
        steps = 256 * found[:, 0].double() + found[:, 1].double()
        assert ((steps * scales[:, None] - product).abs() <= 0.51 * scales[:, None]).all()
        assert_near(scales * 32512, product.abs().amax(1).clamp(min=1e-30).float())
    for fault in (math.nan, math.inf):
        x[4, 7] = fault
        for _, scales in (elementwise.round_to_bytes(x, columns), twin.round_to_bytes(x, columns)):
            assert scales.isfinite().tolist() == [True] * 4 + [False, True]


def test_a_weight_in_eight_bits_is_within_half_a_step() -> None:
    """Of a row's largest entry, in columns of one size."""
    sizes = normal(80).mul(2).exp()
    weight = (normal(7, 80) * normal(7, 1).exp() * sizes).bfloat16()
    weight[3] = weight[:, 9] = 0
    found = InBytes.of(weight)
    even = (weight.float() / found.columns).abs()
    steps = even.amax(1, keepdim=True) / 127
    difference = (whole(found) - weight.float()).abs() / found.columns
    assert (difference <= 0.5001 * steps).all() and found.values.abs().amax(1).tolist() == [127] * 3 + [0] + [127] * 3
    assert (even.square().mean(0).sqrt()[sizes.argsort()[[0, -1]]] - 1).abs().max() < 0.01
    weight[2, 5] = math.nan
    assert InBytes.of(weight).scales[2].isnan()


@pytest.mark.parametrize("in_bytes", [False, True])
def test_a_weight_is_measured_out_of_any_cache(in_bytes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[int, int] = {}

    def launch(x: Tensor, weight: Tensor | InBytes, *_: object) -> None:
        values = weight.values if isinstance(weight, InBytes) else weight
        read[values.data_ptr()] = values.nbytes

    monkeypatch.setattr(linear, "_launch", launch)
    monkeypatch.setattr(linear, "choose", lambda products, run, keep: run())
    monkeypatch.setattr(linear, "IN_NO_CACHE", 50_000)
    weight = torch.ones(64, 96, dtype=torch.bfloat16)
    linear.tune(InBytes.of(weight) if in_bytes else weight)
    assert 50_000 <= sum(read.values()) < 64_000


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "outputs", "depth"), [(3, 48, 64), (17, 41, 96)])
def test_the_residual_comes_with_what_the_next_norm_needs(
    tokens: int, outputs: int, depth: int, dtype: torch.dtype
) -> None:
    x, weight = normal(tokens, depth, dtype=dtype), normal(outputs, depth, dtype=dtype, scale=0.1)
    hidden, norm, bias = (
        normal(tokens, outputs, dtype=dtype),
        normal(outputs, dtype=dtype),
        normal(outputs, dtype=dtype),
    )
    for given in (None, bias):
        expected = twin.project_add(x, weight, given, hidden, norm)
        out, weighted, squares = linear.project_add(x, weight, given, hidden, norm)
        assert_near(out, expected[0])
        assert_near(weighted, expected[1])
        torch.testing.assert_close(squares.sum(1, keepdim=True), expected[2], rtol=1e-2, atol=0)
        torch.testing.assert_close(squares.sum(1), out.float().square().sum(1), rtol=1e-5, atol=0)


class Attention:
    """A random call: rows of text that end at `lengths`, the last `queries` tokens of each being new."""

    def __init__(
        self, lengths: list[int], queries: int, capacity: int, group: int, dim: int, dtype: torch.dtype, n_kv: int = 2
    ) -> None:
        batch = len(lengths)
        self.positions = torch.tensor([range(n - queries, n) for n in lengths], device=DEVICE).clamp(0, capacity - 1)
        self.qkv = normal(batch * queries, (group + 2) * n_kv * dim, dtype=dtype)
        self.sinks = normal(group * n_kv, scale=3.0).to(dtype)
        angles = normal(batch * queries, 1, dim // 2) * 3
        self.waves = torch.cat((angles.cos(), angles.sin()), 1).to(dtype).float()
        self.keys = normal(batch, n_kv, capacity, dim, dtype=dtype)
        self.values = normal(batch, n_kv, capacity + 1, dim, dtype=dtype)[:, :, 1:].contiguous()
        self.qk_norm = normal((group + 1) * n_kv, dim, dtype=dtype)
        for row, n in enumerate(lengths):  # what stands behind a text must not matter
            self.keys[row, :, n:] = self.values[row, :, n:] = math.nan

    def run(
        self, attend, norm: bool, window: int | None, rotates: bool = True, **scoring
    ) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = self.keys.clone(), self.values.clone()
        if attend is twin.attend:
            keys, values = keys.nan_to_num(), values.nan_to_num()
        waves, qk_norm = self.waves if rotates else None, self.qk_norm if norm else None
        out = attend(self.qkv, waves, self.positions, keys, values, qk_norm, 1e-5, window, **scoring)
        return out, keys.nan_to_num(), values.nan_to_num()


@pytest.fixture(params=["few tokens", "long walks", "walks"])
def walks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How a row's slots are cut, whatever the call's size says."""
    monkeypatch.setattr(attention, "SAME_BITS", 1 << 30 if request.param == "few tokens" else 0)
    monkeypatch.setattr(attention, "ENOUGH", 1 << 30 if request.param == "walks" else 1)
    monkeypatch.setattr(attention, "SHORT", 128)
    monkeypatch.setattr(attention, "WALKED", 1 << 10)


@pytest.mark.usefixtures("walks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "queries", "capacity", "group", "dim", "norm", "window"),
    [
        ([1], 1, 8, 1, 16, False, None),
        ([130], 1, 200, 4, 64, False, None),
        ([5, 131, 300], 5, 310, 3, 32, True, None),
        ([128, 257], 2, 260, 2, 96, False, 100),
        ([40], 17, 64, 8, 16, True, 7),
        ([4200], 3, 4200, 2, 16, False, None),
        ([200], 70, 210, 1, 16, True, 40),
    ],
)
def test_attention_equals_its_twin(
    lengths: list[int],
    queries: int,
    capacity: int,
    group: int,
    dim: int,
    norm: bool,
    window: int | None,
    dtype: torch.dtype,
) -> None:
    call = Attention(lengths, queries, capacity, group, dim, dtype)
    for actual, expected in zip(
        call.run(attention.attend, norm, window), call.run(twin.attend, norm, window), strict=True
    ):
        assert_near(actual, expected)


@pytest.mark.usefixtures("walks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "queries", "capacity", "group", "dim", "window", "scoring"),
    [
        ([3, 131], 2, 140, 1, 64, None, {}),
        ([3, 131], 2, 140, 3, 64, 5, {"scale": 0.3}),
        ([129], 2, 140, 3, 96, None, {"softcap": 2.0}),
        ([150], 9, 160, 4, 128, 128, {"softcap": 0.7, "scale": 0.05}),
        ([4, 300], 1, 300, 2, 64, 20, {"sinks": True}),
    ],
)
def test_attention_of_heads_that_are_rotated_already(
    lengths: list[int],
    queries: int,
    capacity: int,
    group: int,
    dim: int,
    window: int | None,
    scoring: dict,
    dtype: torch.dtype,
) -> None:
    call = Attention(lengths, queries, capacity, group, dim, dtype)
    scoring = scoring | ({"sinks": call.sinks} if "sinks" in scoring else {})
    for actual, expected in zip(
        call.run(attention.attend, False, window, rotates=False, **scoring),
        call.run(twin.attend, False, window, rotates=False, **scoring),
        strict=True,
    ):
        assert_near(actual, expected)
    rows = torch.arange(len(lengths), device=DEVICE)[:, None]
    heads = call.qkv.view(len(lengths), queries, -1, dim)
    for written, first in zip(call.run(attention.attend, False, window, False, **scoring)[1:], (-4, -2), strict=True):
        assert torch.equal(written.transpose(1, 2)[rows, call.positions], heads[:, :, first:][:, :, :2])


@pytest.fixture
def row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's products: those of a tile round a row by its place in it, on some CPUs."""
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype=None: np.einsum("ij,jk->ik", a, b, dtype=dtype))


@pytest.mark.usefixtures("walks", "row_by_row")
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("asked", [1, 2])
def test_the_last_queries_alone(asked: int, window: int | None) -> None:
    """All keys and values are written, and what is asked for has the bits that it has among the others."""
    call = Attention([6, 131, 300], 5, 310, 3, 32, torch.float32)
    whole, *written = call.run(attention.attend, True, window)
    found, *ours = call.run(attention.attend, True, window, asked=asked)
    assert torch.equal(found.view(3, asked, -1), whole.view(3, 5, -1)[:, -asked:])
    assert all(torch.equal(here, there) for here, there in zip(ours, written, strict=True))
    assert_near(found, call.run(twin.attend, True, window, asked=asked)[0])


@pytest.mark.usefixtures("walks")
def test_queries_that_share_the_last_slot() -> None:
    """Drafts beyond the cache are clamped to its end: either value may stay, the tokens before must not notice."""
    call = Attention([14], 4, 16, 2, 16, torch.float32)
    plain = call.run(attention.attend, False, None)[0]
    call.positions = torch.tensor([[10, 11, 12, 12]], device=DEVICE)
    clamped, keys, _ = call.run(attention.attend, False, None)
    assert torch.equal(clamped[:2], plain[:2])
    assert keys[0, :, 12].abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rest_equals_its_twins(dtype: torch.dtype) -> None:
    table, norm, delta = normal(11, 48, dtype=dtype), normal(48, dtype=dtype), normal(3, 48, dtype=dtype)
    ids = torch.tensor([[3, 10, 0]], device=DEVICE)
    positions = torch.tensor([[0, 1, 5000]], device=DEVICE)
    arguments = ids, positions, table, norm, normal(6).abs(), 1.5, 4
    hidden, weighted, squares, waves = elementwise.embed(*arguments)
    expected = twin.embed(*arguments)
    assert torch.equal(hidden, expected[0])
    assert_near(weighted, expected[1])
    torch.testing.assert_close(squares, expected[2])
    torch.testing.assert_close(waves, expected[3], rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)
    assert_near(elementwise.normalise(hidden, norm, 1e-5), twin.normalise(hidden, norm, 1e-5))
    for actual, wanted in zip(
        elementwise.add_norm(hidden, delta, norm, 1e-5), twin.add_norm(hidden, delta, norm, 1e-5), strict=True
    ):
        assert_near(actual, wanted)
    assert_near(elementwise.gate(table), twin.gate(table))


def test_an_id_outside_the_vocabulary_reads_no_other_memory() -> None:
    table = normal(5, 16)
    ids = torch.tensor([[-1, 5, 2**40]], device=DEVICE)
    hidden, *_ = elementwise.embed(ids, torch.zeros_like(ids), table, normal(16), normal(4), 1.0, 1)
    assert torch.equal(hidden, table[[0, 4, 4]])


@pytest.mark.parametrize(
    ("room", "chunk", "head", "fits"),
    [
        (231424, 128, 256, 128),  # an H200, heads of 128 in 16 bits
        (231424, 128, 512, 128),
        (100352, 128, 256, 128),  # a card with 99 KB
        (100352, 128, 512, 64),
        (100352, 32, 1024, 32),  # heads of 256 in float32
        (100352, 32, 2048, 16),  # and of 512: no fewer than a matrix instruction takes
    ],
)
def test_attention_takes_what_fits_into_shared_memory(
    room: int, chunk: int, head: int, fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "shared_memory", lambda device: room)
    assert attention._fitting(chunk, head, torch.device("cpu")) == fits


@pytest.mark.parametrize(
    ("tokens", "programs", "capacity", "split"),
    [
        (5, 8, 1024, 128),  # few tokens: whatever else there is
        (16, 128, 4096, 128),
        (16, 8, 131072, 4096),
        (20, 32, 1024, 256),
        (40, 64, 1024, 512),
        (40, 64, 4096, 512),  # most of which may be empty
        (32, 256, 1024, 1024),  # enough programs without splits
        (32, 256, 600, 1024),
        (32, 256, 8, 256),
        (32, 256, 131072, 4096),
    ],
)
def test_many_tokens_have_long_splits(tokens: int, programs: int, capacity: int, split: int) -> None:
    for dtype, dim in itertools.product(DTYPES, (16, 128, 144, 256)):
        found = attention.plan(tokens, programs, capacity, dim, normal(1, 1, dtype=dtype))
        assert found.split == split and found.split % found.chunk == 0
        assert (found.stages == 1) == (tokens <= 16 or dtype == torch.float32)


@pytest.mark.parametrize("room", [100352, 231424])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_what_is_under_way_fits_into_shared_memory(dim: int, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "shared_memory", lambda device: room)
    found = attention.plan(40, 64, 1024, dim, normal(1, 1, dtype=torch.float16))
    assert found.stages == 3 and 2 * (found.stages - 1) * found.chunk * dim * 2 <= room - (20 << 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "dim", "window"), [(9, 128, None), (5, 128, 100), (7, 144, 300)])
def test_many_tokens_equal_their_twin(queries: int, dim: int, window: int | None, dtype: torch.dtype) -> None:
    """Cut as it is in use: rows of which some see none or only a part of a split."""
    call = Attention([690, 300, 40, 520], queries, 700, 4, dim, dtype)
    for actual, expected in zip(
        call.run(attention.attend, False, window, sinks=call.sinks),
        call.run(twin.attend, False, window, sinks=call.sinks),
        strict=True,
    ):
        assert_near(actual, expected)
