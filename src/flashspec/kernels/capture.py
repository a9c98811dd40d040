"""Capturing CUDA graphs for measurements, and what every capture needs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

import torch

_lock = Lock()
_collected: list[bool] = []  # of each capture under way, in any thread, whether garbage was collected ahead of it


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection: a graph that dies in one spoils a capture under way (torch's pull request 161037)."""
    with _lock:
        _collected.append(gc.isenabled())
        gc.disable()
    try:
        yield
    finally:
        with _lock:
            collected = _collected[0]
            _collected.pop()
            if collected and not _collected:
                gc.enable()


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with uncollected(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph
