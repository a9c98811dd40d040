"""What a selector hears of a step."""

from __future__ import annotations

from typing import Any

import pytest
from decoding import TakingTurns, every_drafter, open_run
from fakes import MarkovModel

TARGET = MarkovModel.random(6, seed=53, max_context=128)


class Listening(TakingTurns):
    def __init__(self, n_arms: int) -> None:
        super().__init__(n_arms)
        self.heard: list[tuple[int, float | None]] = []

    def update(self, arm: int, *counts: Any, seconds: float | None = None, **rows: Any) -> None:
        self.heard.append((arm, seconds))
        super().update(arm, *counts, seconds=seconds, **rows)


@pytest.mark.parametrize("lag", [0, 1])
def test_reading_a_prompt_is_no_step_s_time(lag: int) -> None:
    selector = Listening(2)
    run = open_run(TARGET, [[1] * 80], ["model:2", "plain"], every_drafter(TARGET), 12, selector=selector, lag=lag)
    list(run)
    (first, reading), *others = selector.heard
    assert first == 0 and reading is None
    assert {arm for arm, _ in others} == {0, 1} and all(seconds is not None for _, seconds in others)


@pytest.mark.parametrize("lag", [0, 1])
def test_nor_is_it_that_of_the_step_before(lag: int) -> None:
    """Which the host hears of late; a run's first step waits for the prefill."""
    selector, arms = Listening(3), ["plain", "early-exit:2", "model:2"]
    list(open_run(TARGET, [[1] * 80], arms, every_drafter(TARGET), 20, selector=selector, lag=lag))
    heard = [seconds is not None for _, seconds in selector.heard]
    assert heard[:3] == ([True, True, False] if lag == 0 else [False] * 3) and all(heard[3:])


def test_reading_a_few_tokens_is() -> None:
    selector = Listening(1)
    list(open_run(TARGET, [[1] * 8], ["model:2"], every_drafter(TARGET), 12, selector=selector))
    assert all(seconds is not None for _, seconds in selector.heard)
