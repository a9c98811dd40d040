"""What a forward costs by its width: measured once, before the first request."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flashspec.engine.graphs import Capture
from flashspec.models.base import LEAST_SLOTS, LanguageModel
from flashspec.models.reader import Reader

TEXT = 64  # tokens, of which fewer are read


@dataclass(frozen=True, slots=True)
class CostTable:
    """seconds: width of a target forward -> seconds, for a short text."""

    seconds: dict[int, float]

    @property
    def plain_seconds(self) -> float:
        return self.seconds[min(self.seconds)]

    @property
    def token_cost(self) -> float:
        """What one more token costs, as a fraction of a plain step: the least-squares slope over the widths."""
        widths = list(self.seconds)
        centre, middle = sum(widths) / len(widths), sum(self.seconds.values()) / len(widths)
        spread = sum((width - centre) ** 2 for width in widths)
        slope = sum((width - centre) * (self.seconds[width] - middle) for width in widths) / spread
        return max(slope / self.plain_seconds, 1e-3)

    def at(self, width: int) -> float:
        """Seconds of any width, by the slope."""
        return self.plain_seconds * (1 + self.token_cost * (width - 1))

    def for_rows(self, rows: int) -> CostTable:
        """What so many rows would take where this is of one: as if they were one row of as many tokens."""
        return CostTable({width: self.at(rows * width) for width in self.seconds})


@torch.inference_mode()
def measure_costs(
    model: LanguageModel,
    rows: int = 1,
    widths: tuple[int, ...] = (1, 5, 9),
    takes: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    capture: Capture | None = None,
) -> CostTable:
    """Time forwards over scratch text, captured where there is a capture. The first take of each width is a warm-up;
    of the others the quickest counts, since a neighbour only slows. A single row has as many slots as most texts, and
    so their kernels; for more rows that would take memory."""
    reader = Reader(model, rows, min(LEAST_SLOTS if rows == 1 else TEXT, model.max_context))
    seconds = {}
    for width in widths:
        token_ids = torch.zeros(rows, width, dtype=torch.int64, device=model.device)
        positions = torch.arange(width, device=model.device).repeat(rows, 1)

        def forward(token_ids: Tensor = token_ids, positions: Tensor = positions) -> None:
            model.logits(reader.read(token_ids, positions, TEXT))

        times: list[float] = []
        work: Callable[[], None] = forward
        for take in range(takes + 1):
            started = clock()
            work()
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            times.append(clock() - started)
            if take == 0 and capture is not None:
                work = capture(forward)
        seconds[width] = min(times[1:])
    return CostTable(seconds)
