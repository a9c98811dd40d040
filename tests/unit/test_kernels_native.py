"""The native decoder against a plain PyTorch twin, and bit for bit against itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashspec.kernels import native_build
from flashspec.kernels.native import FORMATS, NativeDecoder, NativeLayer, NativeShape, PackedLinear, PackedMatrix

needs_compiler = pytest.mark.skipif(not native_build.available(), reason=native_build.why_not() or "built")

GGUF_TYPES = {
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_1": gguf.GGMLQuantizationType.Q4_1,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
PLAIN = NativeShape(
    vocab_size=71, hidden_size=40, intermediate_size=50, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=16,
    rms_norm_eps=1e-5,
)  # fmt: skip


def pack(weight: Tensor, format: str) -> PackedMatrix:
    if format in GGUF_TYPES:
        blocks = gguf.quants.quantize(weight.numpy(), GGUF_TYPES[format])
        return PackedMatrix.from_gguf(torch.from_numpy(blocks), format)
    return PackedMatrix.from_tensor(weight.bfloat16() if format == "bf16" else weight)


@dataclass
class Twin:
    """The decoder written the plain way, from the same parts."""

    shape: NativeShape
    embedding: PackedMatrix
    layers: list[NativeLayer]
    final_norm: Tensor
    lm_head: PackedMatrix
    cos: Tensor
    sin: Tensor

    def native(self) -> NativeDecoder:
        return NativeDecoder(self.shape, self.embedding, self.layers, self.final_norm, self.lm_head, self.cos, self.sin)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.shape.rms_norm_eps).rsqrt() * weight

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:  # (B, Q, heads, head_dim)
        cos, sin = self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def forward(self, ids: Tensor, positions: Tensor, keys: Tensor, values: Tensor, num_layers: int) -> Tensor:
        shape, (batch, queries) = self.shape, ids.shape
        rows = torch.arange(batch)[:, None]
        x = self.embedding.dequantise()[ids]
        for index, layer in enumerate(self.layers[:num_layers]):
            h = self.norm(x, layer.attention_norm)
            q = F.linear(h, layer.q.dequantise(), layer.q_bias).view(batch, queries, -1, shape.head_dim)
            k = F.linear(h, layer.k.dequantise(), layer.k_bias).view(batch, queries, -1, shape.head_dim)
            v = F.linear(h, layer.v.dequantise(), layer.v_bias).view(batch, queries, -1, shape.head_dim)
            q = q if layer.q_norm is None else self.norm(q, layer.q_norm)
            k = k if layer.k_norm is None else self.norm(k, layer.k_norm)
            keys[index][rows, :, positions] = self.rotate(k, positions).to(keys.dtype)
            values[index][rows, :, positions] = v.to(values.dtype)
            mixed = self.attention(self.rotate(q, positions), keys[index], values[index], positions)
            x = x + F.linear(mixed, layer.o.dequantise(), layer.o_bias)
            h = self.norm(x, layer.mlp_norm)
            gated = F.silu(F.linear(h, layer.gate.dequantise())) * F.linear(h, layer.up.dequantise())
            x = x + F.linear(gated, layer.down.dequantise())
        return self.norm(x, self.final_norm)

    def attention(self, q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        group = self.shape.num_heads // self.shape.num_kv_heads
        slots = torch.arange(keys.shape[2])
        seen = slots <= positions[..., None]  # (B, Q, capacity)
        if self.shape.sliding_window:
            seen &= slots > positions[..., None] - self.shape.sliding_window
        k, v = (cache.float().nan_to_num().repeat_interleave(group, 1) for cache in (keys, values))
        scores = torch.einsum("bqhd,bhsd->bhqs", q, k) * self.shape.head_dim**-0.5
        weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        return torch.einsum("bhqs,bhsd->bqhd", weights, v).flatten(2)


def make(shape: NativeShape, format: str, *, head: str | None = None, extras: bool = False) -> Twin:
    """extras: biases and query and key norms. head None: the embedding is the head."""
    torch.manual_seed(0)
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden, mlp = shape.hidden_size, shape.intermediate_size

    def matrix(rows: int, columns: int, kind: str = format) -> PackedMatrix:
        return pack(torch.randn(rows, columns) * columns**-0.5, kind)

    def vector(size: int, mean: float = 0.0) -> Tensor:
        return mean + 0.1 * torch.randn(size)

    layers = [
        NativeLayer(
            vector(hidden, 1), vector(hidden, 1), matrix(q_size, hidden), matrix(kv_size, hidden),
            matrix(kv_size, hidden), matrix(hidden, q_size), matrix(mlp, hidden), matrix(mlp, hidden),
            matrix(hidden, mlp),
        )
        for _ in range(shape.num_layers)
    ]  # fmt: skip
    if extras:
        layers = [
            replace(
                layer, q_norm=vector(shape.head_dim, 1), k_norm=vector(shape.head_dim, 1), q_bias=vector(q_size),
                k_bias=vector(kv_size), v_bias=vector(kv_size), o_bias=vector(hidden),
            )
            for layer in layers
        ]  # fmt: skip
    embedding = matrix(shape.vocab_size, hidden, head or format)
    lm_head = matrix(shape.vocab_size, hidden) if head else embedding
    angles = torch.outer(torch.arange(300.0), 0.3 ** torch.arange(0, 1, 2 / shape.head_dim)).repeat(1, 2)
    return Twin(shape, embedding, layers, vector(hidden, 1), lm_head, angles.cos(), angles.sin())


def caches(shape: NativeShape, batch: int, capacity: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    size = (shape.num_layers, batch, shape.num_kv_heads, capacity, shape.head_dim)
    return torch.full(size, torch.nan, dtype=dtype), torch.full(size, torch.nan, dtype=dtype)


@pytest.mark.parametrize("columns", [64, 96])
@pytest.mark.parametrize("format", GGUF_TYPES)
def test_gguf_blocks_keep_their_values(format: str, columns: int) -> None:
    torch.manual_seed(0)
    blocks = gguf.quants.quantize(torch.randn(50, columns).numpy(), GGUF_TYPES[format])
    packed = PackedMatrix.from_gguf(torch.from_numpy(blocks), format)
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, GGUF_TYPES[format]))
    assert torch.equal(packed.dequantise(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_keep_their_values(dtype: torch.dtype) -> None:
    weight = torch.randn(50, 70).to(dtype)
    packed = PackedMatrix.from_tensor(weight)
    assert packed.format == ("bf16" if dtype == torch.bfloat16 else "f32")
    assert torch.equal(packed.dequantise(), weight.float())


@pytest.mark.parametrize("columns", [64, 70])
def test_quantised_blocks_are_the_nearest_that_q8_0_holds(columns: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(50, columns) * 10 ** torch.linspace(-2, 3, 50)[:, None]
    weight[7:9] = torch.tensor([[0.0], [1e-12]])
    packed = PackedMatrix.quantised(weight)
    found, blocks = packed.dequantise(), F.pad(weight, (0, -columns % 32)).view(50, -1, 32)
    steps = (blocks.abs().amax(-1) / 127).half().float().repeat_interleave(32, 1)[:, :columns]
    assert packed.format == "q8_0" and found.shape == weight.shape
    assert ((found - weight).abs() <= 0.57 * steps + 2e-12).all()  # half, or as the rounded scale shifts the largest
    assert torch.equal(PackedMatrix.quantised(found).dequantise(), found)
    if columns % 32 == 0:
        blocks_of_gguf = torch.from_numpy(gguf.quants.quantize(found.numpy(), GGUF_TYPES["q8_0"]))
        theirs = PackedMatrix.from_gguf(blocks_of_gguf, "q8_0").dequantise()
        torch.testing.assert_close(theirs, found, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf])
def test_quantised_faults_stay_faults(fault: float) -> None:
    weight = torch.full((3, 64), 127.0)
    weight[1, 40] = fault
    found = PackedMatrix.quantised(weight).dequantise()
    assert not found[1, 32:].isfinite().any()
    assert torch.equal(found[[0, 2]], weight[[0, 2]]) and torch.equal(found[1, :32], weight[1, :32])


def test_wrong_weights_are_named() -> None:
    with pytest.raises(ValueError, match="weight should be"):
        PackedMatrix.from_tensor(torch.zeros(3))
    with pytest.raises(ValueError, match="format should be one of"):
        PackedMatrix.from_gguf(torch.zeros(3, 34, dtype=torch.uint8), "q5_0")
    with pytest.raises(ValueError, match="a multiple of 34"):
        PackedMatrix.from_gguf(torch.zeros(3, 35, dtype=torch.uint8), "q8_0")


QUANTISED = replace(PLAIN, hidden_size=96, intermediate_size=160, num_heads=4, num_kv_heads=2, head_dim=32)


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "format", "head", "extras"),
    [
        (PLAIN, "f32", None, False),
        (replace(PLAIN, sliding_window=5), "f32", None, False),
        (replace(PLAIN, sliding_window=70, num_kv_heads=3), "f32", None, True),
        (replace(PLAIN, num_heads=8, num_kv_heads=2, head_dim=128), "bf16", "f32", True),
        (replace(PLAIN, num_heads=2, head_dim=80), "bf16", None, False),
        (QUANTISED, "q8_0", None, False),
        (QUANTISED, "q4_1", "q8_0", False),
        (QUANTISED, "q4_0", "q4_1", True),
    ],
)
def test_agrees_with_the_twin(shape: NativeShape, format: str, head: str | None, extras: bool) -> None:
    twin = make(shape, format, head=head, extras=extras)
    decoder = twin.native()
    ours, theirs = caches(shape, 3, 160), caches(shape, 3, 160)
    lengths = torch.tensor([0, 0, 0])
    for queries, ragged in ((70, [70, 13, 66]), (5, [5, 2, 1]), (1, [1, 1, 1]), (13, [13, 13, 13])):
        ids = torch.randint(shape.vocab_size, (3, queries))
        positions = lengths[:, None] + torch.arange(queries)
        hidden = decoder.forward(ids, positions, *ours, bound=160)
        expected = twin.forward(ids, positions, *theirs, num_layers=shape.num_layers)
        torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=1e-4)
        logits = decoder.logits(hidden)
        torch.testing.assert_close(logits, expected @ twin.lm_head.dequantise().T, atol=1e-4, rtol=1e-4)
        lengths = lengths + torch.tensor(ragged)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4, equal_nan=True)


@needs_compiler
def test_bfloat16_cache_and_half_width_tables() -> None:
    twin = make(PLAIN, "f32")
    half = replace(twin, cos=twin.cos[:, :8], sin=twin.sin[:, :8])
    ids, positions = torch.randint(71, (2, 9)), torch.arange(9).expand(2, 9)
    ours, theirs = caches(PLAIN, 2, 9, torch.bfloat16), caches(PLAIN, 2, 9, torch.bfloat16)
    hidden = half.native().forward(ids, positions, *ours, bound=9)
    expected = twin.forward(ids, positions, *theirs, num_layers=2)
    torch.testing.assert_close(hidden, expected, atol=2e-2, rtol=0)  # rounding to bfloat16 may go either way
    torch.testing.assert_close(ours[1][0], theirs[1][0], atol=0, rtol=2**-7)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("format", FORMATS)
def test_a_row_does_not_depend_on_its_company(format: str, restore_threads: None) -> None:
    """Bit for bit: one token at a time, any split, any batch and any number of threads give the same logits."""
    shape = replace(QUANTISED, sliding_window=77)
    decoder = make(shape, format).native()
    tokens = torch.randint(shape.vocab_size, (1, 150))
    slots = torch.arange(150)[None]

    def run(batch: int, split: tuple[int, ...]) -> Tensor:
        ids, positions, cache = tokens.expand(batch, -1), slots.expand(batch, -1), caches(shape, batch, 150)
        outputs, start = [], 0
        for count in split:
            part = slice(start, start + count)
            outputs.append(decoder.logits(decoder.forward(ids[:, part], positions[:, part], *cache, bound=150)))
            start += count
        return torch.cat(outputs, 1)

    torch.set_num_threads(1)
    prefill = run(1, (150,))
    assert prefill.isfinite().all()
    assert torch.equal(run(1, (1,) * 150), prefill)
    torch.set_num_threads(3)
    assert torch.equal(run(1, (5, 2, 9, 12, 13, 17, 30, 62)), prefill)
    assert torch.equal(run(4, (100, 3, 16, 31)), prefill.expand(4, -1, -1))


@needs_compiler
def test_early_exit_and_rows_held_at_a_limit() -> None:
    twin = make(PLAIN, "f32")
    decoder = twin.native()
    ours, theirs = caches(PLAIN, 2, 8), caches(PLAIN, 2, 8)
    ids = torch.randint(71, (2, 5))
    positions = torch.tensor([[0, 0, 0, 1, 2], [5, 6, 7, 7, 7]])
    for cache in (*ours, *theirs):
        cache[:, 1, :, :5] = 0.5
    hidden = decoder.forward(ids, positions, *ours, bound=8, num_layers=1)
    expected = twin.forward(ids, positions, *theirs, num_layers=1)
    torch.testing.assert_close(hidden[0, 2:], expected[0, 2:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(hidden[1, :2], expected[1, :2], atol=1e-4, rtol=1e-4)
    assert ours[0][1].isnan().logical_or(ours[0][1] == 0.5).all()  # the second layer did not run


@needs_compiler
@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
def test_faults_reach_the_logits(fault: float) -> None:
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        twin = make(PLAIN, "f32")
        weight = getattr(twin.layers[1], name).dequantise()
        weight[0] = fault
        twin.layers[1] = replace(twin.layers[1], **{name: PackedMatrix.from_tensor(weight)})
        decoder = twin.native()
        hidden = decoder.forward(torch.tensor([[3, 4]]), torch.tensor([[0, 1]]), *caches(PLAIN, 1, 4), bound=4)
        assert not decoder.logits(hidden)[0, 1].isfinite().any(), name


@needs_compiler
def test_wrong_arguments_are_named() -> None:
    twin = make(PLAIN, "f32")
    decoder = twin.native()
    ids, positions, (keys, values) = torch.tensor([[3]]), torch.tensor([[0]]), caches(PLAIN, 1, 4)
    cases: list[tuple[str, tuple[object, ...]]] = [
        ("token_ids should be in", (torch.tensor([[71]]), positions, keys, values, 4)),
        ("positions should be in", (ids, torch.tensor([[2]]), keys, values, 2)),
        ("bound should be", (ids, positions, keys, values, 5)),
        ("num_layers should be", (ids, positions, keys, values, 4, 3)),
        ("values should be", (ids, positions, keys, values.bfloat16(), 4)),
        ("keys should be float32", (ids, positions, keys.double(), values.double(), 4)),
        ("should be int64", (ids, positions.int(), keys, values, 4)),
    ]
    for message, arguments in cases:
        with pytest.raises(ValueError, match=message):
            decoder.forward(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hidden should be"):
        decoder.logits(torch.zeros(1, 41))
    with pytest.raises(ValueError, match="head_dim should be"):
        replace(twin, shape=replace(PLAIN, head_dim=8)).native()
    with pytest.raises(ValueError, match="final_norm should be"):
        replace(twin, final_norm=torch.ones(41)).native()
    with pytest.raises(ValueError, match="embedding should be"):
        replace(twin, embedding=PackedMatrix.from_tensor(torch.zeros(70, 40))).native()


FAKE_COMPILER = """
import pathlib, sys
if "--version" in sys.argv:
    print("fake 1.0")
else:
    pathlib.Path(__file__).with_suffix(".calls").open("a").write("x")
    if {fails}:
        sys.exit("line one\\nno such flag")
    pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_text("not a library")
"""


@pytest.fixture
def fresh_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("FLASHSPEC_CACHE", str(tmp_path / "cache"))
    native_build._load.cache_clear()
    yield tmp_path
    native_build._load.cache_clear()


def test_no_compiler_is_a_sentence(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fresh_build))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(RuntimeWarning, match=r"no C\+\+ compiler.*plain PyTorch runs, which is slower") as told:
        assert not native_build.available() and not native_build.available()
    assert len(told) == 1
    assert "no C++ compiler" in native_build.why_not()
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        make(PLAIN, "f32").native()


@pytest.mark.parametrize(("fails", "reason"), [(True, "no such flag"), (False, "could not be built or loaded")])
def test_a_bad_compiler_is_a_sentence(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch, fails: bool, reason: str
) -> None:
    compiler = fresh_build / "compiler.py"
    compiler.write_text(FAKE_COMPILER.format(fails=fails))
    monkeypatch.setenv("CXX", f"{sys.executable} {compiler}")
    with pytest.warns(RuntimeWarning, match=reason):
        assert not native_build.available()
    assert reason in native_build.why_not()
    assert "\n" not in native_build.why_not()
    native_build._load.cache_clear()
    assert not native_build.available()
    calls = len(compiler.with_suffix(".calls").read_text())
    assert calls == (4 if fails else 1)  # with and without OpenMP, twice; what was built is kept
    assert [path.suffix for path in (fresh_build / "cache").iterdir()] == ([] if fails else [".so"])


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 32, 64), (3, 70, 100), (70, 33, 31)])
def test_a_packed_product(shape: tuple[int, int, int]) -> None:
    rows, outputs, inputs = shape
    weight, x = torch.randn(outputs, inputs), torch.randn(1, rows, inputs)
    for packed in (PackedMatrix.from_tensor(weight.bfloat16()), PackedMatrix.quantised(weight)):
        expected = x @ packed.dequantise().T
        torch.testing.assert_close(PackedLinear(packed)(x), expected, rtol=1e-5, atol=1e-4)
        normed = x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt() * x[0, 0]
        found = PackedLinear(packed, x[0, 0], eps=0.5)(x)
        torch.testing.assert_close(found, normed @ packed.dequantise().T, rtol=1e-5, atol=1e-4)
        with pytest.raises(ValueError, match="hidden should be"):
            PackedLinear(packed)(x.double())
