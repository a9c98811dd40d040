"""Whether an engine's steps wait for the GPU."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from flashspec import SpeculativeEngine
from flashspec.engine.loop import Run


def assert_no_step_synchronises(
    engine: SpeculativeEngine, prompts: Sequence[Sequence[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two answers of 60 tokens; in the second nothing that leads to a step may, behind the prefill: neither choosing
    its arm, launching it nor telling the selector of earlier ones."""
    engine.generate(prompts, 60)
    strict = dict.fromkeys(("_decide", "_launch", "_tell"), 0)

    def strictly(name: str) -> None:
        work = getattr(Run, name)

        def wrapped(self: Run, *arguments: Any) -> Any:
            if not self.flights and not any(map(longer, self.state.texts, prompts)):
                return work(self, *arguments)  # a prefill may
            strict[name] += 1
            torch.cuda.set_sync_debug_mode("error")
            try:
                return work(self, *arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(Run, name, wrapped)

    for name in strict:
        strictly(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a drafter that fails, or cannot be captured, warns
        result = engine.generate(prompts, 60)
    assert (result.output_ids >= 0).sum(1).tolist() == [60] * len(prompts)
    assert min(strict.values()) > 5


def longer(text: Sequence[int], prompt: Sequence[int]) -> bool:
    return len(text) > len(prompt)
