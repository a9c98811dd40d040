"""Capturing work on the device, to repeat it at the price of one launch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Protocol
from warnings import warn

import torch

from flashspec.kernels.capture import uncollected

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE as Pool

Work = Callable[[], None]


class Capture(Protocol):
    """Records work on the device without doing it; what it returns does it."""

    def __call__(self, work: Work) -> Work: ...


class WherePossible:
    """An engine's capture: work that it refuses stays as it is, and one warning says so for all of it.

    torch.OutOfMemoryError is raised, and what it caused: it is nothing about the work."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._warned = False

    def __call__(self, work: Work) -> Work:
        try:
            return self._capture(work)
        except Exception as error:
            if isinstance(error.__cause__ or error, torch.OutOfMemoryError):
                raise
            if not self._warned:
                self._warned = True
                reason = str(error).partition("\n")[0]
                sentence = f"steps run without a CUDA graph, since they cannot be captured: {reason}"
                warn(sentence, RuntimeWarning, stacklevel=2)
            return work


class CudaGraphs:
    """Captures into CUDA graphs that share their memory, since one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Pool | None = None

    def __call__(self, work: Work) -> Work:
        pool = self._pool or self._open_pool()
        try:
            return self._record(work, pool).replay
        except BaseException:
            self._pool = None  # what failed may have broken it
            with suppress(RuntimeError):  # now: until the next good capture torch 2.11 draws no random numbers
                self._open_pool()
            raise

    def _open_pool(self) -> Pool:
        pool = torch.cuda.graph_pool_handle()
        anything = partial(torch.zeros, 1, device=self.device)
        self._pool, self._anchor = pool, self._record(anything, pool)  # a pool dies with its last graph
        return pool

    def _record(self, work: Callable[[], object], pool: Pool) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with uncollected(), torch.cuda.stream(self.stream):
            try:
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                work()
                graph.capture_end()
            except BaseException:
                _abandon(graph, self.stream.device_index, pool)
                raise
        torch.cuda.current_stream().wait_stream(self.stream)
        return graph


_abandoned: list[torch.cuda.CUDAGraph] = []


def _abandon(graph: torch.cuda.CUDAGraph, device_index: int, pool: Pool) -> None:
    """End a capture that failed. Where `capture_end` raises, torch 2.11 leaves its allocators capturing, so that
    `torch.cuda.empty_cache()` and the next capture into the pool would raise (torch's pull request 180395, in 2.12)."""
    with suppress(RuntimeError):
        graph.capture_end()
    with suppress(RuntimeError):  # raises where torch has done it
        torch._C._cuda_endAllocateToPool(device_index, pool)
        torch._C._cuda_releasePool(device_index, pool)
        _abandoned.append(graph)  # which the allocator of pinned memory will ask for ever whether a stream is its own
