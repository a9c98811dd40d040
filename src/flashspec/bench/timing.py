"""How a call is timed: replays of a CUDA graph on a GPU, the clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, Protocol

import torch

from flashspec.kernels.capture import captured


class Timer(Protocol):
    """(microseconds, spread) of one call(i), called for i in 0..calls - 1: the median over takes of those calls, of two
    rounds the second; spread is the difference between the rounds. before() runs ahead of every take, untimed."""

    def __call__(
        self, call: Callable[[int], Any], before: Callable[[], Any] | None = None, /
    ) -> tuple[float, float]: ...


def make_timer(device: str, replays: int, calls: int) -> Timer:
    """Calls must read nothing back where the device is a GPU."""
    return partial(_in_a_graph if device.startswith("cuda") else _by_the_clock, replays, calls)


def _by_the_clock(
    takes: int, calls: int, call: Callable[[int], Any], before: Callable[[], Any] | None = None, /
) -> tuple[float, float]:
    def take() -> float:
        if before is not None:
            before()
        started = time.perf_counter()
        for index in range(calls):
            call(index)
        return 1e6 * (time.perf_counter() - started) / calls

    take()  # warm-up
    first, second = (median(take() for _ in range(takes)) for _ in range(2))
    return round(second, 3), round(abs(second - first), 3)


def _in_a_graph(
    replays: int, calls: int, call: Callable[[int], Any], before: Callable[[], Any] | None = None, /
) -> tuple[float, float]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            if before is not None:
                before()
            call(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = captured(lambda: [call(index) for index in range(calls)])
    _median_replay(graph, 5, before)
    first, second = (_median_replay(graph, replays, before) / calls for _ in range(2))
    return round(second, 3), round(abs(second - first), 3)


def _median_replay(graph: torch.cuda.CUDAGraph, replays: int, before: Callable[[], Any] | None) -> float:
    starts, ends = ([_timed_event() for _ in range(replays)] for _ in range(2))
    for start, end in zip(starts, ends, strict=True):
        if before is not None:
            before()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return 1e3 * median(float(start.elapsed_time(end)) for start, end in zip(starts, ends, strict=True))


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def copy_bandwidth(device: str, timer: Timer, elements: int = 2**28) -> float:
    """Bytes a second, read and written, of a large copy: by a kernel, as copies captured in a graph run slower."""
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    taken, _ = timer(lambda index: torch.neg(source, out=target))
    return 2 * source.nbytes / taken * 1e6
