"""What a selector hears of a step."""

from __future__ import annotations

from typing import Any

import pytest
from decoding import TakingTurns, every_drafter, open_run
from fakes import MarkovModel, ScriptedDrafter, greedy_text
from torch import Tensor

from flashspec.bandit import AutoSelector

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


class Slow(MarkovModel):
    """A second a forward, and a tenth for each token of a row behind the first."""

    now = 0.0

    def forward(self, token_ids: Tensor, *arguments: Any, **options: Any) -> Tensor:
        self.now += 1 + 0.1 * (token_ids.shape[1] - 1)
        return super().forward(token_ids, *arguments, **options)


def test_a_batch_takes_no_longer_than_its_slow_row_would() -> None:
    """Five rows of six draft every token right, and are done after a fifth of the steps that the sixth takes."""
    target = Slow.random(6, seed=53, max_context=256)
    prompts, count = [[1, row] for row in range(6)], 120
    texts = [greedy_text(target, prompt, count + 4) for prompt in prompts]
    texts[5] = [(token + 1) % 6 for token in texts[5]]
    drafter = ScriptedDrafter(lambda text, length: texts[text[1]][len(text) - 2 :][:length])
    selector = AutoSelector(2, [("scripted", 4), ("", 0)], [1.4, 1.0], seed=0)
    arms = ["scripted:4", "plain"]
    run = open_run(target, prompts, arms, {"scripted": drafter}, count, selector=selector, temperature=0)
    run.clock, target.now = lambda: target.now, 0.0
    played = [output.record.arm for output in run]
    assert len(played) > 100  # the sixth row's drafts were wrong
    assert target.now < 1.15 * count
