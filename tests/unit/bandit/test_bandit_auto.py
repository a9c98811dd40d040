"""Tokens per second, on simulated drafters whose acceptance and costs are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from math import sqrt
from operator import and_
from random import Random
from typing import Any

import pytest

from flashspec.bandit import AutoSelector, DraftSelector, make_selector
from flashspec.bandit.auto import ALLOWANCE, FRESH, LEAD, LOSS, Costs, Survival
from flashspec.bandit.trace import Decision, play

ARMS = [("", 0), ("cheap", 2), ("cheap", 8), ("good", 2), ("good", 4), ("good", 8)]
CHANCE = {"": 0.0, "cheap": 0.3, "good": 0.85}  # that a draft token is accepted after those before it
TOKEN_SECONDS = {"": 0.0, "cheap": 0.0005, "good": 0.001}
STEP_SECONDS = 0.01


def seconds_of(arm: int, dearer: float = 1.0) -> float:
    drafter, length = ARMS[arm]
    return (STEP_SECONDS + TOKEN_SECONDS[drafter] * length) * (dearer if drafter == "good" else 1.0)


def rate_of(arm: int, dearer: float = 1.0) -> float:
    """Expected tokens per second."""
    drafter, length = ARMS[arm]
    return (1 + sum(CHANCE[drafter] ** k for k in range(1, length + 1))) / seconds_of(arm, dearer)


def responder(random: Random, dearer: float = 1.0) -> Callable[[int], Decision]:
    def respond(arm: int) -> Decision:
        drafter, length = ARMS[arm]
        accepted = 0
        while accepted < length and random.random() < CHANCE[drafter]:
            accepted += 1
        noise = random.uniform(0.9, 1.1)
        return Decision(arm, accepted, length, ((length, accepted),), noise * seconds_of(arm, dearer))

    return respond


def selector_of(seed: int = 0, arms=ARMS, seconds=None, **options) -> AutoSelector:  # type: ignore[no-untyped-def]
    return AutoSelector(len(arms), arms, seconds or [STEP_SECONDS] * len(arms), seed=seed, **options)


def lead_of(selector: DraftSelector) -> float:
    lead: float = json.loads(selector.to_json())["state"]["lead"]
    return lead


def achieved(decisions: list[Decision]) -> float:
    """Tokens per second of what was played."""
    return sum(1 + d.accepted for d in decisions) / sum(d.seconds or 0.0 for d in decisions)


def best_arm(dearer: float = 1.0) -> int:
    return max(range(len(ARMS)), key=lambda arm: rate_of(arm, dearer))


def test_it_plays_the_arm_with_most_tokens_per_second() -> None:
    assert ARMS[best_arm()] == ("good", 8)
    decisions = play(selector_of(), responder(Random(1)), 600)
    assert sum(d.arm == best_arm() for d in decisions[200:]) > 320
    assert achieved(decisions[200:]) > 0.95 * rate_of(best_arm())


@pytest.mark.parametrize("other", ["ucb1", "thompson"])
def test_it_beats_selectors_that_count_acceptance_only(other: str) -> None:
    """The short arms have the highest acceptance rate, and are not the fastest."""

    def average(make: Callable[[int], DraftSelector]) -> float:
        return sum(achieved(play(make(seed), responder(Random(seed)), 400)) for seed in range(3)) / 3

    ours = average(selector_of)
    assert ours > 1.05 * average(lambda seed: make_selector(other, len(ARMS), seed=seed))


def test_a_draft_of_eight_teaches_every_shorter_length() -> None:
    selector = selector_of(arms=[("d", n) for n in range(1, 9)])
    for _ in range(60):
        selector.update(7, 3, 8, seconds=STEP_SECONDS)
    expected = [rate * STEP_SECONDS - 1 for rate in selector.expected_rates()]  # accepted tokens
    assert expected == pytest.approx([1, 2, 3, 3, 3, 3, 3, 3], abs=0.1)


def survival_of(longest: int, fade: float = 1.0) -> Survival:
    return Survival([("d", length) for length in range(longest + 1)], fade)


def test_moments_by_hand() -> None:
    survival = survival_of(2)
    survival.learn(2, [[1]], None)
    first = (1 + 0.7) / 2
    second = 0.7 * first / 2
    mean = first + second
    assert survival.moments == [
        (0.0, 0.0),
        (pytest.approx(first), pytest.approx(sqrt((first - first**2) / 2))),
        (pytest.approx(mean), pytest.approx(sqrt((first + 3 * second - mean**2) / 2))),
    ]


def test_short_drafts_hardly_fade_what_is_known_of_deep_ones() -> None:
    survival = survival_of(4, fade=0.5)
    survival.restore({"d": {"tried": [10.0] * 4, "kept": [5.0] * 4}})
    survival.learn(2, [[0]], None)
    assert survival.state() == {
        "d": {"tried": pytest.approx([6.0, 6.0, 9.99, 9.99]), "kept": pytest.approx([2.5, 2.5, 4.995, 4.995])}
    }


def test_rows_are_evidence_each_for_itself() -> None:
    by_rows, one_by_one = survival_of(2), survival_of(2)
    by_rows.begin(2)
    by_rows.learn(2, [[2, 1]], None)
    for accepted in (2, 1):
        one_by_one.learn(2, [[accepted]], None)
    assert by_rows.state()["d"]["kept"] == pytest.approx([2.0, 1.0])
    assert by_rows.moments[2] == pytest.approx(one_by_one.moments[2])


def test_conclusions_that_waited_are_those_of_one_report_after_the_other() -> None:
    at_once, one_by_one = selector_of(window_size=5), selector_of(window_size=5)
    some, both = [True, False], [True, True]
    steps: list[Any] = [(4, ((4, 2), (4, 0)), both, 0.015), (4, ((4, 4), (4, 1)), None, 0.3)]
    steps += [(4, ((4, 0), (4, 3)), some, None), (4, ((4, 1), (4, 1)), some, 0.014)]
    steps += [(0, None, some, 0.011), (0, None, None, 0.009), (3, ((2, 1), (2, 0)), some, 0.013)]
    steps += [(3, ((2, 2), (2, 0)), both, 0.012)]
    for selector in (at_once, one_by_one):
        selector.begin(2)
        selector.give_way(4, 0.001)
        for arm, rows, critical, seconds in 2 * steps:
            drafted, accepted = (sum(column) for column in zip(*(rows or [(0, 0)]), strict=True))
            more = selector is at_once
            selector.update(arm, accepted, drafted, rows=rows, critical=critical, seconds=seconds, more=more)
        selector.give_way(2, 0.001)
    assert at_once.expected_rates() == pytest.approx(one_by_one.expected_rates())
    states = [json.loads(selector.to_json())["state"] for selector in (at_once, one_by_one)]
    for known in ("totals", "lost", "weights"):
        assert states[0]["costs"][known] == pytest.approx(states[1]["costs"][known])
    for drafter, counts in states[1]["survival"].items():
        assert states[0]["survival"][drafter] == {name: pytest.approx(found) for name, found in counts.items()}
    assert states[0]["lead"] == pytest.approx(states[1]["lead"], rel=1e-3)


@pytest.mark.parametrize("ask", ["select", "expected_rates", "to_json", "rival", "begin"])
def test_whoever_asks_hears_what_is_concluded_by_then(ask: str) -> None:
    selector, told_at_once = selector_of(), selector_of()
    for _ in range(20):
        selector.update(5, 8, 8, seconds=STEP_SECONDS, more=True)
        told_at_once.update(5, 8, 8, seconds=STEP_SECONDS)
    assert len(selector._heard) == 20 and not told_at_once._heard
    getattr(selector, ask)(*[1] * (ask in ("rival", "begin")))
    assert not selector._heard
    assert selector.expected_rates() == pytest.approx(told_at_once.expected_rates(), rel=0.05)


def test_one_slow_step_counts_at_most_twice_the_mean() -> None:
    costs = Costs([0.01, 0.01])
    costs.learn(0, [100.0], 0.5)
    assert costs.means == [pytest.approx(0.015), 0.01]
    counted = costs.learn(0, [None], 0.5)  # slow steps are forgotten, the guess is not
    assert counted == costs.means[0] == pytest.approx((0.01 + 0.999 * 0.02) / 1.999)


def test_an_absurdly_low_guess_is_soon_put_right() -> None:
    costs = Costs([0.01, 1e-9])
    costs.learn(0, [0.01], 0.99)
    for _ in range(20):
        costs.learn(1, [0.05], 0.99)
    assert costs.means[1] > 0.04


def test_guesses_made_on_a_busy_machine_leave_no_arm_untried() -> None:
    """All three times too slow, so that the arm whose steps are measured first looks three times as quick as others."""
    arms = [("", 0), ("fair", 4), ("good", 4)]
    takes, accepted = [1.0, 1.2, 1.2], [0, 1, 3]
    for seed in range(20):
        selector = selector_of(seed, arms=arms, seconds=[3.0, 3.6, 3.6])
        decisions = play(selector, lambda arm: Decision(arm, accepted[arm], arms[arm][1], seconds=takes[arm]), 100)
        assert sum(decision.arm == 2 for decision in decisions) > 80


def test_guesses_are_never_raised() -> None:
    costs = Costs([0.01, 0.01])
    for _ in range(50):
        costs.learn(0, [0.02], 0.99)
    assert costs.means[1] == 0.01


def test_time_lost_in_other_arms_steps_counts() -> None:
    """It drafts four right tokens in every tenth step, and is asked in vain, at the price of a step, in the others."""
    selector = selector_of(arms=[("", 0), ("lookup", 4)])
    for _ in range(10):
        selector.update(1, 4, 4, seconds=STEP_SECONDS)
    assert selector.expected_rates()[1] > 4 * selector.expected_rates()[0]
    for _ in range(10):
        for _ in range(9):
            selector.give_way(1, STEP_SECONDS)
            selector.update(0, 0, 0, seconds=STEP_SECONDS)
        selector.update(1, 4, 4, seconds=STEP_SECONDS)
    assert selector.expected_rates()[1] < 0.95 * selector.expected_rates()[0]


def test_a_batch_waits_for_its_slow_rows() -> None:
    """Nine rows that take every draft are as good as done; the tenth takes none, and drafts make its steps longer."""
    arms = [("", 0), ("d", 4)]
    selector = selector_of(arms=arms)
    selector.begin(10)

    def respond(arm: int, critical: list[bool]) -> None:
        rows = [(arms[arm][1], arms[arm][1])] * 9 + [(arms[arm][1], 0)]
        drafted, accepted = (sum(column) for column in zip(*rows, strict=True))
        selector.update(arm, accepted, drafted, rows=rows, critical=critical, seconds=STEP_SECONDS * (1 + 0.5 * arm))

    for _ in range(20):
        respond(selector.select(), [True] * 10)
    assert selector.expected_rates()[1] > 2 * selector.expected_rates()[0]
    respond(1, [False] * 9 + [True])
    assert selector.expected_rates()[1] < 0.8 * selector.expected_rates()[0]
    assert [selector.select() for _ in range(20)].count(0) > 18


def test_a_new_batch_begins_with_what_the_critical_rows_said() -> None:
    selector = selector_of(arms=[("d", 1)], window_size=0)
    selector.begin(2)
    for _ in range(300):
        selector.update(0, 1, 2, rows=[(1, 0), (1, 1)], critical=[True, False])
    selector.begin(3)
    ((tried,), (kept,)) = selector._survival.state()["d"].values()
    assert tried == pytest.approx(100, rel=0.1) and kept == 0
    selector.update(0, 3, 3, rows=[(1, 1)] * 3)
    assert selector._survival.state()["d"]["kept"] == [3.0]


def test_rows_that_end_count_no_more_whatever_is_played() -> None:
    selector = selector_of(arms=[("", 0), ("d", 1)], window_size=0)
    selector.update(1, 1, 2, rows=[(1, 0), (1, 1)])
    assert selector._survival.state()["d"]["kept"] == [1.0]
    selector.update(0, 0, 0, critical=[True, False])
    assert selector._survival.state()["d"]["kept"] == [0.0]
    selector.update(1, 2, 2, rows=[(1, 1), (1, 1)])  # None: all
    assert selector._survival.state()["d"]["kept"] == [pytest.approx(3.0, rel=0.01)]


def test_as_many_rows_are_critical_or_not_as_there_are() -> None:
    with pytest.raises(ValueError, match="critical"):
        selector_of(arms=[("d", 1)]).update(0, 1, 1, rows=[(1, 1)], critical=[True, False])


def test_an_arm_whose_cost_doubles_is_left() -> None:
    dearer, played = 3.0, 0
    assert ARMS[best_arm(dearer)][0] != "good"
    for seed in range(5):
        selector, random = selector_of(seed), Random(seed)
        play(selector, responder(random), 300)
        decisions = play(selector, responder(random, dearer), 400)
        played += sum(ARMS[d.arm][0] == "good" for d in decisions[200:])
    assert played < 5 * 60


def test_a_doubled_cost_turns_the_choice_between_two_drafters() -> None:
    arms = [("a", 4), ("b", 4)]
    selector = selector_of(arms=arms)

    def respond(arm: int, a_seconds: float) -> Decision:
        return Decision(arm, 3, 4, seconds=a_seconds if arm == 0 else 0.015)

    play(selector, lambda arm: respond(arm, 0.01), 200)
    before = [d.arm for d in play(selector, lambda arm: respond(arm, 0.01), 100)]
    play(selector, lambda arm: respond(arm, 0.02), 200)
    after = [d.arm for d in play(selector, lambda arm: respond(arm, 0.02), 100)]
    assert before.count(0) > 90 and after.count(1) > 90


def test_plain_wins_where_nothing_is_accepted() -> None:
    decisions = play(selector_of(), lambda arm: Decision(arm, 0, ARMS[arm][1], seconds=seconds_of(arm)), 400)
    assert sum(d.arm == 0 for d in decisions[100:]) > 180
    assert achieved(decisions[100:]) > 0.95 * rate_of(0)  # trying again costs less than 5 %


@pytest.mark.parametrize("batch_size", [1, 32])
def test_the_same_acceptance_pays_at_one_row_and_not_at_32(batch_size: int) -> None:
    """32 rows fill the machine: a draft token a row adds half of a plain step; at one row a hundredth."""
    arms = [("", 0), ("d", 2), ("d", 4), ("d", 8)]
    chance, token_share = 0.5, 0.01 if batch_size == 1 else 0.5
    seconds = [STEP_SECONDS * (1 + token_share * length) for _, length in arms]
    random = Random(10)

    def respond(arm: int) -> Decision:
        length = arms[arm][1]
        rows = []
        for _ in range(batch_size):
            accepted = 0
            while accepted < length and random.random() < chance:
                accepted += 1
            rows.append((length, accepted))
        noise = random.uniform(0.9, 1.1)
        return Decision(arm, sum(kept for _, kept in rows), length * batch_size, tuple(rows), noise * seconds[arm])

    lengths = [arms[decision.arm][1] for decision in play(selector_of(arms=arms), respond, 400)[100:]]
    if batch_size == 1:
        assert sum(length > 0 for length in lengths) > 280
    else:
        assert lengths.count(0) > 280


def test_everything_accepted_makes_the_longest_draft_win() -> None:
    selector = selector_of()
    respond = lambda arm: Decision(arm, ARMS[arm][1], ARMS[arm][1], seconds=STEP_SECONDS)  # noqa: E731
    assert {ARMS[d.arm][1] for d in play(selector, respond, 300)[100:]} == {8}


@pytest.mark.parametrize("delay", [1, 4, 8])
def test_late_feedback_still_teaches(delay: int) -> None:
    decisions = play(selector_of(), responder(Random(3)), 600, delay)
    assert sum(d.arm == best_arm() for d in decisions[200:]) > 320


def test_the_same_seed_makes_the_same_choices() -> None:
    traces = [play(selector_of(seed), responder(Random(4)), 200) for seed in (7, 7, 8)]
    assert traces[0] == traces[1] != traces[2]


def test_reset_starts_over() -> None:
    selector = selector_of(seed=7)
    first = play(selector, responder(Random(4)), 50)
    selector.reset()
    assert selector.t == 0
    assert play(selector, responder(Random(4)), 50) == first


def test_json_round_trip_goes_on_with_the_same_choices() -> None:
    selector = selector_of(seed=7)
    for rounds in (60, 40):
        selector.begin(1)
        play(selector, responder(Random(4)), rounds)
    twin = AutoSelector.from_json(selector.to_json())
    assert twin.expected_rates() == selector.expected_rates()
    assert twin.to_json() == selector.to_json() and lead_of(twin) != 0
    for each in (selector, twin):
        while lead_of(each) > -9 * STEP_SECONDS:
            each.give_way(5, STEP_SECONDS)
        each.begin(1)
    assert twin.to_json() == selector.to_json()
    assert play(twin, responder(Random(5)), 200) == play(selector, responder(Random(5)), 200)


def test_disabled_arms_are_not_played() -> None:
    selector = selector_of()
    selector.disable(best_arm())
    decisions = play(selector, responder(Random(6)), 300)
    assert best_arm() not in {d.arm for d in decisions}
    selector.enable(best_arm())
    assert best_arm() in {d.arm for d in play(selector, responder(Random(6)), 100)}


def test_a_rival_is_the_best_arm_of_another_drafter_in_the_time_of_a_step() -> None:
    selector = selector_of()
    play(selector, responder(Random(8)), 400)
    for arm in range(len(ARMS)):
        selector.update(arm, 0, ARMS[arm][1], seconds=seconds_of(arm))
    rates, seconds = selector.expected_rates(), selector._costs.means
    assert selector.rival(1) == pytest.approx(max(rates[3:]) * seconds[1])
    assert selector.rival(2) == pytest.approx(max(rates[3:]) * seconds[2])
    assert selector.rival(2) > selector.rival(1)
    assert selector.rival(3) == pytest.approx(max(1.0, max(rates[:3]) * seconds[3]))
    selector.disable(5)
    assert selector.rival(1) == pytest.approx(max(rates[3:5]) * seconds[1])


def test_silence_makes_an_arm_dearer_and_what_it_has_to_beat_no_more() -> None:
    """It would never speak again otherwise."""
    selector = selector_of()
    play(selector, responder(Random(8)), 100)
    rival, rate = selector.rival(1), selector.expected_rates()[1]
    for _ in range(100):
        selector.give_way(1, STEP_SECONDS / 2)
    assert selector.rival(1) == rival and selector.expected_rates()[1] < 0.8 * rate
    selector.update(1, 2, 2, seconds=seconds_of(1))
    assert selector.rival(1) < 1.1 * rival


def test_an_arm_whose_first_step_was_slow_gets_its_chance() -> None:
    arms = [("worse", 4), ("better", 4)]
    chance, random = [0.5, 0.8], Random(3)
    selector = selector_of(arms=arms)
    selector.update(1, 0, 4, seconds=9 * STEP_SECONDS)

    def respond(arm: int) -> Decision:
        accepted = next((k for k in range(4) if random.random() > chance[arm]), 4)
        return Decision(arm, accepted, 4, ((4, accepted),), STEP_SECONDS)

    assert sum(d.arm for d in play(selector, respond, 2500)[1500:]) > 950


def test_a_slow_plain_step_makes_no_rival_much_stronger() -> None:
    selector = selector_of()
    play(selector, responder(Random(9)), 400)
    before = selector.rival(1)
    selector.update(0, 0, 0, seconds=9 * STEP_SECONDS)
    assert selector.rival(1) < 1.2 * before


def hopeless(arm: int) -> Decision:
    """No draft token is ever accepted, and a step with a draft takes twice as long."""
    _, length = ARMS[arm]
    return Decision(arm, 0, length, ((length, 0),), STEP_SECONDS * (2 if length else 1))


def kept(arm: int) -> Decision:
    """As long as a hopeless step, and every draft token is accepted."""
    _, length = ARMS[arm]
    return replace(hopeless(arm), accepted=length, rows=((length, length),))


@pytest.mark.parametrize("seed", range(5))
def test_a_text_that_drafts_do_not_suit_costs_next_to_nothing(seed: int) -> None:
    """One step of a draft at a time is decided upon before the loss of the last is known."""
    rounds = 1000
    seconds = [decision.seconds or 0.0 for decision in play(selector_of(seed), hopeless, rounds, delay=1)]
    lost = sum(seconds) / STEP_SECONDS - rounds
    assert 3 <= lost <= rounds * LOSS + ALLOWANCE + 2
    assert sum(seconds[-200:]) <= 200 * STEP_SECONDS * (1 + 2 * LOSS) + STEP_SECONDS


@pytest.mark.parametrize("length", [8, 32, 128])
def test_many_texts_that_drafts_do_not_suit_cost_two_per_cent_at_the_most(length: int) -> None:
    random = Random(length)

    def respond(arm: int) -> Decision:
        decision = hopeless(arm)
        accepted = sum(accumulate((random.random() < 0.3 for _ in range(decision.drafted)), and_))
        return replace(decision, accepted=accepted, rows=None, seconds=STEP_SECONDS * (1.6 if decision.drafted else 1))

    selector, lost = selector_of(), 0.0
    for _ in range(2048 // length):
        selector.begin(1)
        played = play(selector, respond, length, delay=1)
        lost += sum((d.seconds or 0.0) / STEP_SECONDS - 1 - d.accepted for d in played)
    assert ALLOWANCE <= lost <= 2 * LOSS * 2048 + ALLOWANCE


@pytest.mark.parametrize("lead, playable", [(-4.1, {0}), (-3.9, {0, 1}), (-2.9, {0, 1, 2}), (0.0, {0, 1, 2, 3})])
def test_a_draft_that_could_cost_more_than_is_left_waits(lead: float, playable: set[int]) -> None:
    """The dearest would cost more than the whole allowance: it has its chance where nothing is owed."""
    arms = [("", 0), ("cheap", 4), ("dear", 4), ("dearest", 30)]
    selector = selector_of(arms=arms, seconds=[steps * STEP_SECONDS for steps in (1, 1.05, 2, 6)])
    document = json.loads(selector.to_json())
    document["state"]["lead"] = lead * STEP_SECONDS
    selector = AutoSelector.from_json(json.dumps(document))
    assert {selector.select() for _ in range(500)} == playable


def test_time_lost_in_silence_counts_and_what_was_gained_may_be_spent() -> None:
    selector = selector_of()
    for _ in range(5):
        selector.give_way(1, STEP_SECONDS)
    assert {selector.select() for _ in range(50)} == {0}
    assert 0 not in {selector.select([0]) for _ in range(50)}
    selector.update(5, 8, 8, seconds=STEP_SECONDS)
    assert {selector.select() for _ in range(50)} != {0}


def test_drafts_that_did_not_suit_one_text_are_tried_in_the_next() -> None:
    selector = selector_of()
    play(selector, hopeless, 100)
    while lead_of(selector) > -(ALLOWANCE + 2) * STEP_SECONDS:
        selector.give_way(5, STEP_SECONDS)
    assert {d.arm for d in play(selector, responder(Random(2)), 64)} == {0}
    selector.begin(1)
    assert lead_of(selector) == pytest.approx((FRESH - ALLOWANCE) * STEP_SECONDS, rel=0.1)
    assert sum(d.arm > 0 for d in play(selector, kept, 64)) > 30
    ahead = lead_of(selector)
    selector.begin(1)
    assert lead_of(selector) == ahead > 0


def test_what_was_gained_long_ago_pays_for_no_more_than_a_few_steps() -> None:
    selector = selector_of()
    play(selector, responder(Random(1)), 300)
    assert lead_of(selector) == pytest.approx(LEAD * selector._costs.means[0])
    lost = sum(d.seconds or 0.0 for d in play(selector, hopeless, 1000)) / STEP_SECONDS - 1000
    assert lost <= 1000 * LOSS + ALLOWANCE + LEAD + 2


def test_only_rows_that_a_batch_waits_for_are_ahead() -> None:
    leads = []
    for critical in ([True, False], [False, True], [True, True]):
        selector = selector_of()
        selector.begin(2)
        selector.update(4, 4, 8, rows=[(4, 4), (4, 0)], critical=critical, seconds=STEP_SECONDS)
        leads.append(lead_of(selector) / STEP_SECONDS)
    assert leads == pytest.approx([4 + LOSS, LOSS, 2 + LOSS], abs=1e-3)


def test_nothing_is_owed_to_plain_decoding_that_is_switched_off() -> None:
    selector = selector_of()
    selector.disable(0)
    for _ in range(200):
        selector.update(5, 0, 8, seconds=2 * STEP_SECONDS)
    selector.enable(0)
    assert {selector.select() for _ in range(50)} != {0}


def test_rows_that_are_not_told_apart_are_one() -> None:
    selector = selector_of()
    selector.update(4, 2, 8, critical=[True, False], seconds=STEP_SECONDS)
    assert selector.t == 1
    assert lead_of(selector) / STEP_SECONDS == pytest.approx(2 + LOSS, abs=1e-3)


def test_rows_of_a_new_batch_all_count_until_it_is_said_which() -> None:
    survival = survival_of(2)
    survival.begin(2)
    survival.learn(0, [[0]], [True, False])
    survival.begin(2)
    survival.learn(2, [[0, 2]], [True, False])
    alone = survival_of(2)
    alone.learn(2, [[0]], None)
    assert survival.moments == alone.moments


def test_without_an_arm_that_decodes_plainly_there_is_nothing_to_compare() -> None:
    selector = selector_of(arms=ARMS[1:])
    for _ in range(50):
        selector.update(0, 0, 2, seconds=9 * STEP_SECONDS)
    assert {selector.select() for _ in range(50)} != {0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_arms": 1}, "n_arms is 1: arms and seconds should name 1 arms, got 2 and 2"),
        ({"seconds": [0.1]}, "got 2 and 1"),
        ({"seconds": [0.1, -1.0]}, "seconds"),
        ({"seconds": [0.1, float("nan")]}, "seconds"),
        ({"arms": [("", 0), ("a", -1)]}, "length"),
        ({"arms": [("", 0), ("a", 1.5)]}, "length"),
        ({"window_size": -1}, "window_size"),
    ],
)
def test_bad_options_are_refused(changes: dict[str, object], message: str) -> None:
    options = {"n_arms": 2, "arms": [("", 0), ("a", 2)], "seconds": [0.1, 0.1], **changes}
    with pytest.raises(ValueError, match=message):
        AutoSelector(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("costs", "totals"), [float("nan"), 0.0]),
        (("costs", "totals"), [-1.0, 0.0]),
        (("costs", "weights"), [0.0, float("inf")]),
        (("costs", "lost"), [-1.0, 0.0]),
        (("costs", "weights"), [0.0]),
        (("costs",), []),
        (("survival", "d", "tried"), [float("nan"), 0.0]),
        (("survival", "d", "kept"), [-1.0, 0.0]),
        (("survival", "d", "kept"), [2.0, 0.0]),  # more kept than tried
        (("survival", "d", "kept"), [0.0]),
        (("survival", "d"), {"tried": [1.0], "kept": [1.0]}),
        (("survival", "d", "tried"), ["many", 0.0]),
        (("survival",), {}),
        (("random", 2), "0.5"),
        (("random", 2), float("inf")),
        (("random",), [3, [1, 2], None]),
    ],
)
def test_damaged_json_is_refused(path: tuple[str | int, ...], value: object) -> None:
    selector = selector_of(arms=[("", 0), ("d", 2)])
    selector.update(1, 1, 2, seconds=0.01)
    document = json.loads(selector.to_json())
    place = document["state"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match="AutoSelector"):
        AutoSelector.from_json(json.dumps(document))


def test_steps_that_cost_nothing_do_no_harm() -> None:
    selector = selector_of(arms=[("", 0)])
    for _ in range(2000):
        selector.update(0, 0, 0, seconds=0.0)
    assert 0 < selector.expected_rates()[0] < float("inf")
