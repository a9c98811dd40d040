"""Captures that fail, over a stand-in for torch's CUDA graphs: its allocator keeps a pool in use until the capture into
it has ended, which in torch 2.11 it never has where ending it fails."""

from __future__ import annotations

import gc
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from flashspec.engine import graphs
from flashspec.engine.graphs import CudaGraphs, WherePossible, Work
from flashspec.engine.loop import DrafterFailed
from flashspec.kernels.capture import uncollected

Pool = tuple[int, int]


class Allocator:
    """capturing: pools under a capture. uses: the graphs of each pool. mends: whether torch ends what failed."""

    def __init__(self, mends: bool) -> None:
        self.mends = mends
        self.capturing: list[Pool] = []
        self.uses: dict[Pool, int] = {}
        self.broken = False  # the capture under way

    def new_pool(self) -> Pool:
        pool = (0, 1 + len(self.uses))
        self.uses[pool] = 0
        return pool

    def begin(self, pool: Pool) -> None:
        if pool in self.capturing:
            raise RuntimeError("already recording to mempool_id")
        self.capturing.append(pool)
        self.uses[pool] += 1
        self.broken = False

    def end(self, device: int, pool: Pool) -> None:
        if pool not in self.capturing:
            raise RuntimeError("not currently recording to mempool_id")
        self.capturing.remove(pool)

    def release(self, device: int, pool: Pool) -> None:
        self.uses[pool] -= 1


class Stream:
    device_index = 0

    def __init__(self, device: object = None) -> None: ...

    def wait_stream(self, other: object) -> None: ...


@pytest.fixture(params=[False, True], ids=["2.11", "2.12"])
def allocator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Allocator:
    allocator = Allocator(mends=request.param)

    class Graph:
        def capture_begin(self, pool: Pool, capture_error_mode: str) -> None:
            allocator.begin(pool)
            self.pool = pool

        def capture_end(self) -> None:
            if allocator.broken:
                if allocator.mends and self.pool in allocator.capturing:
                    allocator.end(0, self.pool)
                raise RuntimeError("operation failed due to a previous error during capture")
            allocator.end(0, self.pool)

        def replay(self) -> None: ...

    for name, stand_in in (
        ("CUDAGraph", Graph),
        ("Stream", Stream),
        ("stream", lambda stream: nullcontext()),
        ("current_stream", Stream),
        ("graph_pool_handle", allocator.new_pool),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", allocator.end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", allocator.release, raising=False)
    monkeypatch.setattr(graphs, "_abandoned", [])
    return allocator


def refused(allocator: Allocator) -> Any:
    def work() -> None:
        allocator.broken = True
        raise ValueError("the host reads a value")

    return work


def test_the_first_reason_is_told_and_others_are_captured(allocator: Allocator) -> None:
    capture, other = CudaGraphs(torch.device("cpu")), CudaGraphs(torch.device("cpu"))
    capture(lambda: None)
    for _ in range(3):
        with pytest.raises(ValueError, match="the host reads a value"):
            capture(refused(allocator))
        assert not allocator.capturing  # or `torch.cuda.empty_cache()` would raise
    for each in (capture, other):
        each(lambda: None)()
    assert len(graphs._abandoned) == (0 if allocator.mends else 3)


def test_a_pool_that_broke_is_given_back_and_not_used_again(allocator: Allocator) -> None:
    capture = CudaGraphs(torch.device("cpu"))
    capture(lambda: None)
    (first,) = allocator.uses
    with pytest.raises(ValueError):
        capture(refused(allocator))
    assert allocator.uses[first] == (3 if allocator.mends else 2)  # what holds it, and the graph before
    before = allocator.uses[first]
    capture(lambda: None)
    assert allocator.uses[first] == before and len(allocator.uses) == 2


FULL = torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("by_a_drafter", [False, True])
def test_a_full_memory_says_nothing_of_the_work(by_a_drafter: bool) -> None:
    """The same work is captured once there is room."""
    full = True

    def capture(work: Work) -> Work:
        if full and by_a_drafter:
            raise DrafterFailed("OutOfMemoryError") from FULL
        if full:
            raise FULL
        return repeat

    def repeat() -> None: ...

    where_possible = WherePossible(capture)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DrafterFailed if by_a_drafter else torch.OutOfMemoryError):
            where_possible(lambda: None)
        full = False
        assert where_possible(lambda: None) is repeat


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_waits_until_the_last_of_several_captures(enabled: bool) -> None:
    """Of threads, which end in any order."""
    (gc.enable if enabled else gc.disable)()
    try:
        first, second = uncollected(), uncollected()
        for capture in (first, second):
            capture.__enter__()
        first.__exit__(None, None, None)
        assert not gc.isenabled()
        second.__exit__(None, None, None)
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_a_capture_is_tried_again_when_there_is_memory_for_a_pool(
    allocator: Allocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = CudaGraphs(torch.device("cpu"))

    def fail(*_: object, **__: object) -> None:
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", fail)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                capture(lambda: None)
    capture(lambda: None)()
    assert not allocator.capturing
