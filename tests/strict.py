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
    """Two answers of 60 tokens; in the second every step behind the prefill may not."""
    engine.generate(prompts, 60)
    launch, strict = Run._launch, [0]

    def strictly(self: Run, *arguments: Any) -> Any:
        if not self.flights and not any(len(text) > len(p) for text, p in zip(self.state.texts, prompts, strict=False)):
            return launch(self, *arguments)  # a prefill may
        strict[0] += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Run, "_launch", strictly)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a drafter that fails, or cannot be captured, warns
        result = engine.generate(prompts, 60)
    assert (result.output_ids >= 0).sum(1).tolist() == [60] * len(prompts)
    assert strict[0] > 5
