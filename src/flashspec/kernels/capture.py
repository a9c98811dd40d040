"""Capturing CUDA graphs for measurements, and what every capture needs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection: a graph that dies in one spoils a capture under way (torch's pull request 161037)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with uncollected(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph
