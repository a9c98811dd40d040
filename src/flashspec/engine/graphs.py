"""Capturing work on the device, to repeat it at the price of one launch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol
from warnings import warn

import torch

Work = Callable[[], None]


class Capture(Protocol):
    """Records work on the device without doing it; what it returns does it."""

    def __call__(self, work: Callable[[], object]) -> Work: ...


class CudaGraphs:
    """Captures into CUDA graphs that share their memory, since one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._anchor = self(partial(torch.zeros, 1, device=device))  # a pool dies with its last graph

    def __call__(self, work: Callable[[], object]) -> Work:
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self.stream)
        return graph.replay


def captured(work: Work, capture: Capture) -> Work:
    """The work as a graph; as it is, with a warning, where something in it cannot be captured."""
    try:
        return capture(work)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        warn(f"a step runs without a CUDA graph, since it cannot be captured: {reason}", RuntimeWarning, stacklevel=2)
        return work
