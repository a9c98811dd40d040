"""Greedy and coupled texts depend on neither drafters, arms, batches nor how late the news arrives."""

from __future__ import annotations

import pytest
from decoding import EVERY_ARM, TakingTurns, decode, engine_of, every_drafter, open_run
from fakes import MarkovModel, greedy_text

from flashspec.bandit import make_selector
from flashspec.core import FinishReason
from flashspec.drafters.model import ModelDrafter
from flashspec.engine.costs import CostTable

RAGGED = [[1, 2, 1, 2, 1], [3], [4, 4, 4, 4, 4, 4, 4, 4, 4], [0, 5, 3, 0, 5, 3, 0]]
COUNT = 25
MIXTURES = [*((arm,) for arm in EVERY_ARM), EVERY_ARM]
TARGET = MarkovModel.random(6, seed=21)
COUPLED = {"temperature": 1.0, "variant": "coupled"}
TRANSFORMED = {**COUPLED, "top_p": 0.9, "top_k": 4, "presence_penalty": 0.5, "repetition_penalty": 1.2}


def by_hand() -> list[list[int]]:
    return [greedy_text(TARGET, prompt, COUNT) for prompt in RAGGED]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("arms", MIXTURES, ids="+".join)
def test_greedy_is_plain_greedy_decoding(arms: tuple[str, ...], lag: int) -> None:
    assert decode(TARGET, RAGGED, arms, every_drafter(TARGET), COUNT, temperature=0, lag=lag) == by_hand()


@pytest.mark.parametrize("strategy", ["auto", "ucb1", "thompson"])
def test_greedy_is_the_same_when_the_arms_are_learned(strategy: str) -> None:
    pairs = [(arm.rpartition(":")[0], int(arm.rpartition(":")[2])) if arm != "plain" else ("", 0) for arm in EVERY_ARM]
    selector = make_selector(strategy, len(EVERY_ARM), arms=pairs, seconds=[0.01] * len(pairs), seed=1)
    texts = decode(TARGET, RAGGED, EVERY_ARM, every_drafter(TARGET), COUNT, temperature=0, selector=selector)
    assert texts == by_hand()


def test_greedy_penalties_count_the_draft_before_each_position() -> None:
    settings = {"temperature": 0, "frequency_penalty": 1.5, "repetition_penalty": 1.3, "logit_bias": {2: 1.0}}
    plain = decode(TARGET, RAGGED, ["plain"], {}, COUNT, **settings)
    assert plain != by_hand()
    assert decode(TARGET, RAGGED, EVERY_ARM, every_drafter(TARGET), COUNT, **settings) == plain


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("settings", [COUPLED, TRANSFORMED], ids=["bare", "transformed"])
@pytest.mark.parametrize("arms", MIXTURES, ids="+".join)
def test_coupled_text_is_a_function_of_the_seed(arms: tuple[str, ...], settings: dict, lag: int) -> None:
    plain = decode(TARGET, RAGGED, ["plain"], {}, COUNT, seed=9, **settings)
    assert decode(TARGET, RAGGED, arms, every_drafter(TARGET), COUNT, seed=9, lag=lag, **settings) == plain
    assert decode(TARGET, RAGGED, ["plain"], {}, COUNT, seed=10, **settings) != plain


def test_coupled_text_does_not_depend_on_the_neighbours() -> None:
    alone = decode(TARGET, RAGGED[:1], EVERY_ARM, every_drafter(TARGET), COUNT, seed=9, **COUPLED)
    for neighbours in ([], RAGGED[1:], [[5]] * 3):
        rows = decode(TARGET, [RAGGED[0], *neighbours], EVERY_ARM, every_drafter(TARGET), COUNT, seed=9, **COUPLED)
        assert rows[0] == alone[0]


def test_equal_prompts_in_a_batch_are_drawn_apart() -> None:
    first, second = decode(TARGET, [[1], [1]], ["plain"], {}, COUNT, seed=9, **COUPLED)
    assert first != second


def test_coupled_drafts_of_the_target_itself_are_accepted_whole() -> None:
    drafters = {"twin": ModelDrafter(MarkovModel(TARGET.table))}
    steps = [output.record for output in open_run(TARGET, RAGGED[:1], ["twin:4"], drafters, COUNT, **COUPLED)]
    assert all(step.accepted == step.drafted for step in steps)


def test_rejection_reproduces_with_its_seed() -> None:
    engine = engine_of(TARGET, list(every_drafter(TARGET).values()), EVERY_ARM, temperature=1.0)
    engine.costs = CostTable({1: 1.0, 2: 1.0})  # where they are measured, a noisy machine changes how far suffix drafts

    def text(**settings: object) -> list[list[int]]:
        engine.selector.reset()
        return engine.generate(RAGGED, COUNT, **settings).output_ids.tolist()

    assert text(seed=3) == text(seed=3) != text(seed=4)


def test_a_seed_that_was_drawn_is_reported_and_brings_the_text_back() -> None:
    engine = engine_of(TARGET, temperature=1.0)
    first = engine.generate([[1]], COUNT)
    assert engine.generate([[1]], COUNT, seed=first.seed).output_ids.tolist() == first.output_ids.tolist()
    assert engine.generate([[1]], COUNT).seed != first.seed


@pytest.mark.parametrize("arms", [["plain"], ["ngram:3"], ["suffix:4"], ["model:3"], EVERY_ARM], ids="+".join)
def test_late_news_are_really_late(arms: list[str]) -> None:
    """With lag 1 a step is launched before the one ahead is read, except by drafters on the host."""
    run = open_run(TARGET, RAGGED, arms, every_drafter(TARGET), COUNT, temperature=0, lag=1)
    launch, ahead = run._launch, []
    run._launch = lambda *step: (ahead.append(len(run.flights)), launch(*step))[1]  # type: ignore[assignment, func-returns-value]
    list(run)
    assert max(ahead) == (0 if arms == ["suffix:4"] else 1)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("arms", [["plain"], ["model:3"], ["suffix:4"], EVERY_ARM], ids="+".join)
def test_a_cancelled_row_leaves_the_others_alone(arms: list[str], lag: int) -> None:
    run = open_run(TARGET, RAGGED, arms, every_drafter(TARGET), COUNT, temperature=0, lag=lag)
    texts: list[list[int]] = [[] for _ in RAGGED]
    for number, output in enumerate(run):
        for row in output.rows:
            texts[row] += output.news.token_ids[row]
        if number == 1:
            run.cancel(1, FinishReason.CANCELLED)
            cancelled_at = len(texts[1])
    assert len(texts[1]) == cancelled_at < COUNT
    del texts[1]
    assert texts == [text for row, text in enumerate(by_hand()) if row != 1]


def test_when_every_row_is_cancelled_the_run_ends() -> None:
    run = open_run(TARGET, RAGGED, ["plain"], {}, COUNT, temperature=0, lag=1, selector=TakingTurns(1))
    steps = 0
    for _ in run:
        steps += 1
        for row in range(len(RAGGED)):
            run.cancel(row, FinishReason.CANCELLED)
    assert steps == 1 and not run.flights
