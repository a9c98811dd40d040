"""The decoder's fast path on a real GPU: equal to plain PyTorch, to itself in a graph, and to itself among others."""

from __future__ import annotations

import ctypes

import pytest
import torch
from small_models import decoder_of
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from flashspec.kernels import decoding
from flashspec.kernels.decoding import Ends
from flashspec.kernels.device import CARVEOUT, SHARED_PERCENT, leave_l1, shared_memory
from flashspec.models.base import KVCache
from flashspec.models.decoder import Decoder, DecoderConfig

if not decoding.available(torch.device("cuda", 0)):
    pytest.skip("needs compute capability 8.0 and Triton", allow_module_level=True)

from flashspec.kernels import direct

CAPACITY, LENGTHS, TEXT = 600, (5, 126, 250), 540
SHAPES = {
    "groups-of-4-128": {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128},
    "groups-of-3-64": {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64},
    "norms-and-windows": {
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 64,
        "qk_norm": True,
        "windows": (None, 50),
    },
    "wide-144": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 144},
    "biases-96": {"num_heads": 8, "num_kv_heads": 1, "head_dim": 96, "qkv_bias": True, "output_bias": True},
}


def build(shape: dict, dtype: torch.dtype) -> Decoder:
    head_dim = shape["head_dim"]
    c = DecoderConfig(
        **{
            "vocab_size": 1003,
            "hidden_size": 576,
            "intermediate_size": 1024,
            "max_context": 4096,
            "norm_eps": 1e-5,
            "inv_freq": tuple(1 / 1e4 ** (i / head_dim) for i in range(0, head_dim, 2)),
            "windows": (None, None),
            **shape,
        }
    )
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator, device="cuda") * 0.08).to(dtype)

    return decoder_of(c, normal)


class Texts:
    """Three rows of random text in a cache, to be continued."""

    def __init__(self, model: Decoder, capacity: int = CAPACITY) -> None:
        self.model = model
        generator = torch.Generator("cuda").manual_seed(1)
        self.ids = torch.randint(0, 1003, (3, TEXT), generator=generator, device="cuda")
        self.cache = model.new_cache(3, capacity)
        slots = torch.arange(TEXT, device="cuda").expand(3, TEXT)
        model.forward(self.ids, slots, self.cache, TEXT)  # by PyTorch: too long

    def call(self, rows: tuple[int, ...], queries: int) -> tuple[Tensor, Tensor, KVCache]:
        starts = torch.tensor([[LENGTHS[row]] for row in rows], device="cuda")
        positions = starts + torch.arange(queries, device="cuda")
        cache = KVCache(self.cache.keys[:, list(rows)].contiguous(), self.cache.values[:, list(rows)].contiguous())
        return self.ids[list(rows)].gather(1, positions), positions, cache

    def logits(self, rows: tuple[int, ...], queries: int) -> Tensor:
        ids, positions, cache = self.call(rows, queries)
        return self.model.logits(self.model.forward(ids, positions, cache, cache.capacity))


@pytest.mark.parametrize("queries", [1, 5, 17, 25, 128, 256], ids="q{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_fast_path_equals_pytorch(shape: dict, dtype: torch.dtype, queries: int) -> None:
    model = build(shape, dtype)
    texts = Texts(model)
    fast = texts.logits((0, 1, 2), queries)
    model._few_tokens = None
    plain = texts.logits((0, 1, 2), queries)
    assert (fast - plain).norm() / plain.norm() < (1e-4 if dtype == torch.float32 else 4e-2)


@pytest.mark.parametrize("shape", list(SHAPES.values())[:2], ids=list(SHAPES)[:2])
def test_a_token_has_the_same_bits_alone_and_among_others(shape: dict) -> None:
    """What makes speculative greedy text in bfloat16 the plain greedy text, bit for bit."""
    texts = Texts(build(shape, torch.bfloat16))
    alone = []
    for row in range(3):
        ids, positions, cache = texts.call((row,), 16)
        steps = [texts.model.forward(ids[:, i : i + 1], positions[:, i : i + 1], cache, CAPACITY) for i in range(16)]
        alone.append(torch.cat([texts.model.logits(step) for step in steps], 1)[0])  # (16, V)
    for rows, queries in (((0,), 2), ((1,), 5), ((2,), 9), ((0,), 16), ((0, 1, 2), 1), ((0, 1, 2), 5)):
        together = texts.logits(rows, queries)
        for place, row in enumerate(rows):
            assert torch.equal(together[place], alone[row][:queries]), (rows, queries)


@pytest.mark.parametrize("queries", [1, 5, 25, 128], ids="q{}".format)
def test_a_graph_follows_lengths_that_change_on_the_device(queries: int) -> None:
    model = build(SHAPES["groups-of-4-128"], torch.bfloat16)
    texts = Texts(model, 5000)  # more than one chunk a split
    model._few_tokens.tune()
    ids, positions, cache = texts.call((0, 1, 2), queries)
    model.logits(model.forward(ids, positions, cache, CAPACITY))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model.logits(model.forward(ids, positions, cache, CAPACITY))
    for moved in (0, 7, 20):
        torch.cuda.set_sync_debug_mode("error")
        try:
            positions += moved
            graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        ours = KVCache(cache.keys.clone(), cache.values.clone())
        assert torch.equal(captured, model.logits(model.forward(ids, positions, ours, CAPACITY)))


def test_the_driver_keeps_what_it_was_told_of_a_kernels_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    monkeypatch.setattr(direct, "leave_l1", lambda *kernel: (leave_l1(*kernel), launched.append(kernel[0])))
    x, weight = (torch.zeros(rows, 512, dtype=torch.bfloat16, device="cuda") for rows in (1, 64))
    direct.launch(x, weight, x.new_empty(1, 64), Ends())
    share = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuFuncGetAttribute(ctypes.byref(share), CARVEOUT, ctypes.c_void_p(launched[0].function))
    assert share.value == (SHARED_PERCENT if shared_memory(x.device) > 200 << 10 else -1)


def test_an_old_gpu_says_so_once_and_takes_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding.available.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.warns(RuntimeWarning, match=r"compute capability 7\.5, below 8\.0"):
        assert build(SHAPES["groups-of-3-64"], torch.float32)._few_tokens is None
    monkeypatch.undo()
    decoding.available.cache_clear()
