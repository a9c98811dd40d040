"""The benchmarks' own branches on a GPU: captured timing, widening in place, transformers captured and compiled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from small_models import llama

from flashspec.bench import kernels, steps
from flashspec.bench.cases import Grid
from flashspec.bench.methods import Setup, make_method
from flashspec.bench.shapes import SHAPES, Shape, random_decoder, shape_config, step_bytes
from flashspec.bench.steps import Plan
from flashspec.bench.timing import copy_bandwidth, make_timer
from flashspec.bench.widen import widen

SMALL = Shape("small", 192, 256, 6, 2, 32, 3, 1000)
WIDE = Shape("wide", 512, 1024, 16, 4, 64, 5, 1000)
CUDA = torch.device("cuda:0")


def test_a_copy_is_as_fast_as_memory_can_be() -> None:
    timer = make_timer("cuda", 10, 4)
    assert 1e11 < copy_bandwidth("cuda", timer) < 2e13


def test_a_graph_takes_as_long_as_its_calls() -> None:
    """A call in a graph of eight costs what it costs in a graph of one, launch aside."""
    source = torch.randn(2**26, device=CUDA)
    target = torch.empty_like(source)
    one, eight = (make_timer("cuda", 20, calls)(lambda index: torch.neg(source, out=target))[0] for calls in (1, 8))
    assert eight < 1.1 * one < 1.5 * eight


def test_kernels_of_every_shape() -> None:
    grid = Grid([2], [1, 3], [1000], [torch.float32])
    result = kernels.run(kernels=["verify_logits", "verify_tokens"], grid=grid, replays=3, calls=2)
    assert [row["gamma"] for row in result["rows"]] == [1, 3, 1, 3]
    assert all(row["microseconds"] > 0 for row in result["rows"])
    assert result["provenance"]["hardware"]["driver"]


def test_a_model_is_widened_on_the_gpu() -> None:
    small = random_decoder(shape_config(SMALL), torch.float32, CUDA)
    config, weights = widen(small.config, small.weights, WIDE, torch.float32, CUDA)
    ids = torch.arange(12, device=CUDA).view(2, 6)
    places = torch.arange(6, device=CUDA).expand(2, -1).contiguous()
    logits = []
    for model in (small, type(small)(config, weights)):
        hidden = model.forward(ids, places, model.new_cache(2, 32), 6)
        logits.append(model.logits(hidden))
    torch.testing.assert_close(*logits, atol=1e-3, rtol=0)
    assert weights.layers[0].qkv.device == CUDA


def test_steps_have_every_part_and_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "small", SMALL)
    plan = Plan([1, 5], [1, 2], ["plain", "ngram:4"], baselines=["transformers-eager", "transformers-graph"])
    result = steps.run(shape="small", random=True, context=256, new_tokens=16, replays=5, device="cuda", plan=plan)
    assert not result["settings"]["left_out"]
    assert len(result["rows"]) == 2 * (2 + 2 + 2 * 2)
    bandwidth = result["settings"]["copy_tb_per_second"] * 1e12
    row = result["rows"][0]
    n_bytes = step_bytes(shape_config(SMALL), torch.bfloat16)
    assert row["mbu"] == pytest.approx(n_bytes / row["microseconds"] * 1e6 / bandwidth, abs=2e-3)


def test_a_baseline_is_compiled_and_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "small", SMALL)
    plan = Plan([1], [1], [], baselines=["transformers-compiled"], baseline_widths=[2])
    result = steps.run(shape="small", random=True, context=256, replays=5, device="cuda", plan=plan)
    assert not result["settings"]["left_out"]
    assert result["rows"][-1]["method"] == "transformers-compiled"


def test_transformers_compiled_writes_the_same_text(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    setup = replace(Setup.load(str(tmp_path), (), "cuda:0", "float32", 8, 0.0), room=16)
    compiled, eager = (make_method(name, setup) for name in ("hf-compiled", "hf-bfloat16"))
    prompts = [[1, 5, 9, 4]]
    assert compiled(prompts).rows == compiled(prompts).rows == eager(prompts).rows
