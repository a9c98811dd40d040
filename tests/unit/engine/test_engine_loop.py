"""What a selector hears of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any

import pytest
import torch
from decoding import TakingTurns, every_drafter, open_run
from fakes import MarkovModel, ScriptedDrafter, greedy_text
from torch import Tensor

from flashspec.bandit import AutoSelector
from flashspec.core import Arm, Draft, FinishReason
from flashspec.drafters.base import DraftContext, Drafter, Proposer
from flashspec.engine.loop import LASTING, STAY
from flashspec.engine.outcome import Letter, Outcome

TARGET = MarkovModel.random(6, seed=53, max_context=128)


class Noting(TakingTurns):
    """Keeps what it is told."""

    def __init__(self, n_arms: int) -> None:
        super().__init__(n_arms)
        self.notes: list[dict[str, Any]] = []
        self.begun: list[int] = []
        self.gave_way: list[tuple[int, float]] = []

    def _begin(self, rows: int) -> None:
        self.begun.append(rows)

    def update(self, arm: int, *counts: Any, **facts: Any) -> None:
        self.notes.append({"arm": arm, **facts})
        super().update(arm, *counts, **facts)

    def give_way(self, arm: int, seconds: float = 0.0) -> None:
        self.gave_way.append((arm, seconds))
        super().give_way(arm, seconds)

    @property
    def heard(self) -> list[tuple[int, float | None]]:
        """Arms and seconds."""
        return [(note["arm"], note["seconds"]) for note in self.notes]


class OnHost(ScriptedDrafter):
    on_host = True


@pytest.mark.parametrize("lag", [0, 1])
def test_reading_a_prompt_is_no_step_s_time(lag: int) -> None:
    selector = Noting(2)
    run = open_run(TARGET, [[1] * 80], ["model:2", "plain"], every_drafter(TARGET), 12, selector=selector, lag=lag)
    list(run)
    (first, reading), *others = selector.heard
    assert first == 0 and reading is None
    assert {arm for arm, _ in others} == {0, 1} and all(seconds is not None for _, seconds in others)


@pytest.mark.parametrize("lag", [0, 1])
def test_nor_is_it_that_of_the_step_before(lag: int) -> None:
    """Which the host hears of late; a run's first step waits for the prefill."""
    selector, arms = Noting(3), ["plain", "early-exit:2", "model:2"]
    list(open_run(TARGET, [[1] * 80], arms, every_drafter(TARGET), 20, selector=selector, lag=lag))
    heard = [seconds is not None for _, seconds in selector.heard]
    assert heard[:3] == ([True, True, False] if lag == 0 else [False] * 3) and all(heard[3:])


def test_nor_is_time_in_which_the_device_waited_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step behind was launched before, and is seen to end when the device is done with it, to begin too late."""
    landings = iter(range(100))
    monkeypatch.setattr(Letter, "is_here", lambda letter: next(landings) in (3, 7, 8))
    selector = Noting(1)
    list(open_run(TARGET, [[1]], ["plain"], every_drafter(TARGET), 14, selector=selector, lag=1))
    assert [at for at, (_, seconds) in enumerate(selector.heard) if seconds is None][1:] == [3, 4, 7, 8, 9]


def test_unless_it_always_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Letter, "is_here", lambda letter: True)
    selector = Noting(1)
    list(open_run(TARGET, [[1]], ["plain"], every_drafter(TARGET), LASTING + 10, selector=selector, lag=1))
    assert [seconds is not None for _, seconds in selector.heard] == [False] * LASTING + [True] * 10


def test_a_drafter_s_time_on_the_host_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Letter, "is_here", lambda letter: True)
    selector, drafters = Noting(2), {"host": OnHost(lambda text, length: [0])}
    list(open_run(TARGET, [[1]], ["plain", "host:1"], drafters, 40, selector=selector, lag=1))
    assert {arm for arm, seconds in selector.heard if seconds is not None} == {1}
    assert [seconds is not None for arm, seconds in selector.heard if arm == 1] == [True] * (len(selector.heard) // 2)


class Twice(Noting):
    """Every arm two times in turn."""

    def _choose(self, arms: Sequence[int]) -> int:
        return arms[self._n_selected // 2 % len(arms)]


class YieldingTwice(Twice):
    gives_way = True


def runs_of(selector: Noting, arm: int) -> list[int]:
    """How many steps in a row an arm was played, each time but the last."""
    runs = [(played, len(list(run))) for played, run in groupby(played for played, _ in selector.heard)]
    return [length for played, length in runs[:-1] if played == arm]


@pytest.mark.parametrize("late", [False, True])
def test_a_host_that_keeps_the_device_waiting_decides_less_often(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What costs nothing stays at once, what drafts when it was decided on twice, and what drafts on the host never.
    Policies that know nothing of time go on as they were."""
    monkeypatch.setattr(Letter, "is_here", lambda letter: late)
    drafters = every_drafter(TARGET) | {"host": OnHost(lambda text, length: [0])}
    for selector in (YieldingTwice(2), Twice(2)):
        stays = STAY if late and selector.gives_way else 0
        list(open_run(TARGET, [[1]], ["plain", "model:2"], drafters, 110, selector=selector, lag=1))
        first, *plain = runs_of(selector, 0)  # the very first step comes before any is late
        assert plain and {*plain} == {2 + 2 * stays} and first <= 2 + 2 * stays
        assert {*runs_of(selector, 1)} == {2 + stays}
    selector = YieldingTwice(2)
    list(open_run(TARGET, [[1]], ["plain", "host:1"], drafters, 110, selector=selector, lag=1))
    assert {*runs_of(selector, 1)} == {2}


@pytest.mark.parametrize("switched_off", [False, True])
def test_an_arm_that_fails_or_is_switched_off_stays_no_longer(
    switched_off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Letter, "is_here", lambda letter: True)

    def draft(text: list[int], length: int) -> list[int]:
        if len(text) > 8:
            if not switched_off:
                raise RuntimeError("no more")
            selector.disable(0)
        return [0]

    selector, drafters = First(2), every_drafter(TARGET) | {"short": ScriptedDrafter(draft)}
    with nullcontext() if switched_off else pytest.warns(RuntimeWarning, match="set aside"):
        outputs = list(open_run(TARGET, [[1]], ["short:1", "plain"], drafters, 40, selector=selector, lag=1))
    first = next(at for at, (arm, _) in enumerate(selector.heard) if arm == 1)
    assert {arm for arm, _ in selector.heard[first:]} == {1} and 2 <= first < 10
    assert len(outputs) - len(selector.heard) == (0 if switched_off else 1)  # nobody is told of the step that failed


def test_a_drafter_that_failed_is_not_asked_again_though_it_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Letter, "is_here", lambda letter: True)
    failures = []

    def draft(text: list[int], length: int) -> list[int]:
        if len(text) > 8:
            failures.append(len(text))
            raise RuntimeError("no more")
        return [0]

    drafters = every_drafter(TARGET) | {"short": ScriptedDrafter(draft)}
    with pytest.warns(RuntimeWarning, match="set aside"):
        list(open_run(TARGET, [[1]], ["short:1"], drafters, 40, selector=Yielding(1), lag=1))
    assert len(failures) == 1


def test_a_letter_is_written_again_and_again() -> None:
    first = Outcome(torch.tensor([[2, 1, 2, int(FinishReason.RUNNING), 0, 7, 8, 9]]))
    second = Outcome(torch.tensor([[2, 0, 1, int(FinishReason.STOP), 0, 5, 6, 4]]))
    letter = Letter(Outcome(torch.zeros_like(first.packed)), None)
    for outcome, tokens in ((first, (7, 8)), (second, (5,)), (first, (7, 8))):
        letter.write(outcome)
        assert letter.fetch() == outcome.read() and letter.fetch().token_ids == [tokens]


def test_reading_a_few_tokens_is() -> None:
    selector = Noting(1)
    list(open_run(TARGET, [[1] * 8], ["model:2"], every_drafter(TARGET), 12, selector=selector))
    assert all(seconds is not None for _, seconds in selector.heard)


class Slow(MarkovModel):
    """A second a forward, and a tenth for each token of a row behind the first."""

    now = 0.0

    def forward(self, token_ids: Tensor, *arguments: Any, **options: Any) -> Tensor:
        self.now += 1 + 0.1 * (token_ids.shape[1] - 1)
        return super().forward(token_ids, *arguments, **options)


@pytest.mark.parametrize("slow", [0, 5])
def test_a_batch_takes_no_longer_than_its_slow_row_would(slow: int) -> None:
    """Five rows of six draft every token right, and have so much to write that they end when the sixth, whose drafts
    are all wrong, has written half of its own."""
    target = Slow.random(6, seed=53, max_context=512)
    prompts, counts = [[1, row] for row in range(6)], [300] * 6
    counts[slow] = 120
    texts = [greedy_text(target, prompt, 304) for prompt in prompts]
    texts[slow] = [(token + 1) % 6 for token in texts[slow]]
    drafter = ScriptedDrafter(lambda text, length: texts[text[1]][len(text) - 2 :][:length])
    auto = AutoSelector(2, [("scripted", 4), ("", 0)], [1.4, 1.0], seed=0)
    arms = ["scripted:4", "plain"]
    run = open_run(target, prompts, arms, {"scripted": drafter}, counts, selector=auto, temperature=0)
    run.clock, target.now = lambda: target.now, 0.0
    played = [str(output.record.arm) for output in run]
    assert played[:40].count("scripted:4") > 35 and played[-30:].count("plain") > 25
    assert target.now < 1.2 * (60 * 1.4 + 60)


class Yielding(Noting):
    gives_way = True


class First(Yielding):
    """The first arm there is."""

    def _choose(self, arms: Sequence[int]) -> int:
        return arms[0]


def test_only_rows_that_may_end_last_are_critical() -> None:
    """Two have most to write; one less, and one would, but meets its stop token in the first step."""
    selector, prompts = Noting(2), [[1], [3], [5], [2]]
    firsts = [greedy_text(TARGET, prompt, 1)[0] for prompt in prompts]
    assert firsts[3] not in firsts[:3]
    run = open_run(
        TARGET,
        prompts,
        ["plain", "ngram:2"],
        every_drafter(TARGET),
        [30, 30, 20, 60],
        selector=selector,
        temperature=0,
        stop_ids=firsts[3:],
    )
    next(iter(run))
    run.close()
    assert [note["critical"] for note in selector.notes] == [[True, True, False, False]] and selector.begun == [4]


def test_arms_that_gave_way_are_charged_for_their_time_and_nobody_else_is() -> None:
    now = [0.0]

    def nothing(text: list[int], length: int) -> list[int]:
        now[0] += 5
        return []

    selector, drafters = Yielding(2), every_drafter(TARGET) | {"mute": ScriptedDrafter(nothing)}
    run = open_run(TARGET, [[1, 2]], ["mute:2", "model:2"], drafters, 20, selector=selector, temperature=0)
    run.clock = lambda: now[0]
    list(run)
    assert len(selector.gave_way) > 3 and set(selector.gave_way) == {(0, 5.0)}
    assert set(selector.heard) == {(1, 0.0)}


@pytest.mark.parametrize(("lag", "its_own", "of_the_step"), [(0, 5.0, {3.0}), (1, 8.0, {None, 0.0})])
def test_a_device_idles_until_the_launch_for_an_arm_that_gives_way(
    lag: int, its_own: float, of_the_step: set[float | None]
) -> None:
    """5 seconds to find out that there is nothing to say, 3 to launch another arm's step, or to take it."""
    now = [0.0]

    def nothing(text: list[int], length: int) -> list[int]:
        now[0] += 5
        return []

    selector = First(2)
    run = open_run(TARGET, [[1]], ["scripted:2", "plain"], on_host(nothing), 20, selector=selector, lag=lag)
    run.clock, attempt = lambda: now[0], run._attempt

    def launching(arm_index: int | None, arm: Arm) -> Outcome | None:
        now[0] += 3 * (not arm.length)
        return attempt(arm_index, arm)

    run._attempt = launching  # type: ignore[method-assign]
    list(run)
    assert len(selector.gave_way) == 20 and set(selector.gave_way) == {(0, its_own)}
    assert {seconds for _, seconds in selector.heard} == of_the_step


def test_another_drafter_on_the_host_has_its_own_time() -> None:
    now = [0.0]

    def working(seconds: float, draft: list[int]) -> Drafter:
        def script(text: list[int], length: int) -> list[int]:
            now[0] += seconds
            return draft

        return OnHost(script)

    selector, drafters = First(3), {"mute": working(5, []), "slow": working(7, [0])}
    run = open_run(TARGET, [[1]], ["mute:1", "slow:1", "plain"], drafters, 20, selector=selector, lag=1)
    run.clock = lambda: now[0]
    list(run)
    assert set(selector.gave_way) == {(0, 5.0)} and {seconds for _, seconds in selector.heard} == {None, 7.0}


def test_a_drafter_that_fails_is_no_other_s_loss() -> None:
    now = [0.0]

    def failing(text: list[int], length: int) -> list[int]:
        now[0] += 7
        raise RuntimeError("broken")

    selector, drafters = First(3), {"mute": OnHost(lambda text, length: []), "broken": OnHost(failing)}
    run = open_run(TARGET, [[1]], ["mute:1", "broken:1", "plain"], drafters, 20, selector=selector, lag=1)
    run.clock = lambda: now[0]
    with pytest.warns(RuntimeWarning, match="'broken' is set aside"):
        list(run)
    assert set(selector.gave_way) == {(0, 0.0)}


def test_nobody_is_told_of_a_step_in_which_every_arm_gave_way() -> None:
    selector, drafters = Yielding(1), {"mute": ScriptedDrafter(lambda text, length: [])}
    list(open_run(TARGET, [[1], [2]], ["mute:2"], drafters, 4, selector=selector, temperature=0))
    assert not selector.notes and len(selector.gave_way) == 4


class Hinting(Drafter):
    """Drafts at every fifth place of a text, and can tell two tokens ahead."""

    name, on_host = "hinting", True

    def __init__(self, fault: Exception | None = None) -> None:
        self.fault = fault
        self.asked: list[int] = []

    def start(self, context: DraftContext) -> Proposer:
        drafter = self

        class Hints(Proposer):
            def expects_nothing(self, context: DraftContext, length: int) -> bool:
                drafter.asked.append(len(context.texts[0]))
                if drafter.fault is not None:
                    raise drafter.fault
                return len(context.texts[0]) % 5 < 3

            def propose(self, context: DraftContext, length: int) -> Draft:
                size = int(len(context.texts[0]) % 5 == 0)
                return Draft(torch.zeros(1, size, dtype=torch.int64), torch.tensor([size]))

        return Hints()


def hinted(lag: int, fault: Exception | None = None) -> tuple[list[int], list[str], Noting, Hinting, list[int]]:
    """The text, the steps, what is told, the drafter, and how many steps were under way at each launch."""
    selector, drafter, ahead = First(2), Hinting(fault), list[int]()
    run = open_run(
        TARGET, [[1]], ["hinting:1", "plain"], {"hinting": drafter}, 20, selector=selector, lag=lag, temperature=0
    )
    launch = run._launch
    run._launch = lambda *step: (ahead.append(len(run.flights)), launch(*step))[1]  # type: ignore[assignment, func-returns-value]
    steps = [str(output.record.arm) for output in run]
    return run.state.texts[0][1:], steps, selector, drafter, ahead


def test_the_device_waits_only_for_a_host_drafter_that_may_have_something_to_say() -> None:
    text, arms, selector, drafter, ahead = hinted(lag=1)
    assert text == greedy_text(TARGET, [1], 20)
    assert arms.count("hinting:1") >= 3 and ahead.count(1) > len(ahead) / 2
    assert ahead.count(0) == 1 + sum(length % 5 >= 3 for length in drafter.asked)
    assert len(selector.gave_way) == len(ahead) - arms.count("hinting:1")


@pytest.mark.parametrize("late", [False, True])
def test_asking_is_free_while_the_device_works(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Letter, "is_here", lambda letter: late)
    now, selector, drafter = [0.0], First(2), Hinting()
    run = open_run(TARGET, [[1]], ["hinting:1", "plain"], {"hinting": drafter}, 99, selector=selector, lag=1)
    run.clock, ask = lambda: now[0], run._expects_nothing

    def asking(arm_index: int) -> bool:
        now[0] += 2
        return ask(arm_index)

    run._expects_nothing = asking  # type: ignore[method-assign]
    list(run)
    lost, took = [seconds for _, seconds in selector.gave_way], [seconds or 0.0 for _, seconds in selector.heard]
    assert set(lost) == ({0.0, 2.0} if late else {0.0})
    assert not late or now[0] / 2 < sum(lost) + sum(took) <= now[0]


@pytest.mark.parametrize("late", [False, True])
def test_what_an_arm_teaches_is_concluded_before_the_next_choice(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each report says whether another one comes before a choice, and while an arm stays many do."""
    monkeypatch.setattr(Letter, "is_here", lambda letter: late)
    selector, reported = YieldingTwice(1), list[int]()
    select = selector.select
    selector.select = lambda *asleep: (reported.append(len(selector.notes)), select(*asleep))[1]  # type: ignore
    list(open_run(TARGET, [[1]], ["plain"], {}, 2 * STAY + 10, selector=selector, lag=1))
    more = [note["more"] for note in selector.notes]
    assert not any(more[count - 1] for count in reported if count)
    assert more.count(False) <= len(reported) and any(more) == late


def test_where_the_host_knows_the_text_it_asks_nobody_what_may_come() -> None:
    text, arms, _, drafter, _ = hinted(lag=0)
    assert text == greedy_text(TARGET, [1], 20) and "hinting:1" in arms and not drafter.asked


def test_a_drafter_that_cannot_even_tell_is_set_aside() -> None:
    with pytest.warns(RuntimeWarning, match="'hinting' is set aside for this request: RuntimeError: broken"):
        text, _, _, drafter, _ = hinted(1, RuntimeError("broken"))
    assert text == greedy_text(TARGET, [1], 20) and len(drafter.asked) == 1


def on_host(script: Callable[[list[int], int], list[int]]) -> dict[str, Drafter]:
    drafter = ScriptedDrafter(script)
    drafter.on_host = True
    return {"scripted": drafter}


def test_a_host_drafter_s_step_is_launched_before_anything_else_is_done_with_the_news() -> None:
    selector, events = Noting(1), list[str]()
    drafters = on_host(lambda text, length: [0] * length)
    run = open_run(TARGET, [[1]], ["scripted:2"], drafters, 12, selector=selector, lag=1, temperature=0)
    launch, update = run._launch, selector.update
    run._launch = lambda *step: (events.append("launch"), launch(*step))[1]  # type: ignore[assignment, func-returns-value]
    selector.update = lambda *facts, **more: (events.append("told"), update(*facts, **more))[1]  # type: ignore
    for _ in run:
        events.append("read")
    assert events[:7] == ["launch", "launch", "told", "read", "launch", "told", "read"]
    assert events.count("launch") == events.count("told") == events.count("read") > 4  # none behind the last token


@pytest.mark.parametrize("prompts", [[[1]], [[1], [2, 2, 2]]])
def test_no_step_is_launched_behind_the_last_token(prompts: list[list[int]]) -> None:
    run = open_run(TARGET, prompts, ["plain"], {}, 12, lag=1, temperature=0)
    launch, launched = run._launch, []
    run._launch = lambda *step: (launched.append(len(run.flights)), launch(*step))[1]  # type: ignore[assignment, func-returns-value]
    assert len(list(run)) == len(launched) == 12 and max(launched) == 1


def test_what_has_landed_is_told_and_read_though_the_next_launch_fails() -> None:
    selector, written = Noting(1), list[int]()
    drafters = on_host(lambda text, length: [0] * length)
    run = open_run(TARGET, [[1]], ["scripted:2"], drafters, 12, selector=selector, lag=1, temperature=0)
    launch, steps = run._launch, iter([None, None, MemoryError])

    def failing(*step: Any) -> Any:
        fault = next(steps)
        if fault is not None:
            raise fault
        return launch(*step)

    run._launch = failing  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        for output in run:
            written += output.news.token_ids[0]
    run.close()
    assert run.state.texts[0] == [1, *written] and len(selector.notes) == 2


def test_a_run_that_is_left_tells_the_rest() -> None:
    selector = Noting(1)
    run = open_run(TARGET, [[1]], ["plain"], {}, 12, selector=selector)
    steps = iter(run)
    next(steps), next(steps)
    assert len(selector.notes) == 1
    run.close()
    assert len(selector.notes) == 2
