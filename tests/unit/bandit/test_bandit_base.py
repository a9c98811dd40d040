import json
import sys
from functools import partial
from random import Random
from threading import Thread

import pytest
from bernoulli import play_bernoulli

from flashspec.bandit import (
    ArmStats,
    DraftSelector,
    FixedSelector,
    OracleSelector,
    ThompsonSelector,
    UCB1Selector,
    make_selector,
)
from flashspec.bandit.base import MAX_OUTSTANDING, Feedback

RATES = (0.2, 0.8, 0.5)
STRATEGIES = ("ucb1", "thompson", "oracle", "fixed")


def selector_of(strategy, n_arms=3, **options):
    rates = (RATES * n_arms)[:n_arms]
    return make_selector(strategy, n_arms, **({"true_rates": rates, "seed": 7} | options))


def choices(selector, rates, n_rounds, seed=0, delay=0):
    return [decision.arm for decision in play_bernoulli(selector, rates, n_rounds, Random(seed), delay)]


every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


@every_strategy
def test_fresh_selector_and_reset(strategy):
    selector = selector_of(strategy)
    assert (selector.n_arms, selector.window_size, selector.t, selector.enabled) == (3, 500, 0, (0, 1, 2))
    first = choices(selector, RATES, 100)
    assert selector.t == 100
    selector.disable(0)
    selector.reset()
    assert (selector.t, selector.enabled) == (0, (1, 2))
    assert [stats.lifetime_pulls for stats in selector.stats] == [0, 0, 0]
    selector.enable(0)
    assert choices(selector, RATES, 100) == first


def test_stats_are_a_snapshot():
    selector = selector_of("ucb1")
    selector.update(1, 2, 4)
    before = selector.stats
    assert isinstance(before, tuple) and isinstance(before[1], ArmStats)
    before[1].record(1)
    selector.update(1, 0, 4)
    assert (before[1].n_pulls, selector.stats[1].n_pulls, selector.stats[1].n_accepted) == (2, 2, 2)


@every_strategy
@pytest.mark.parametrize("n_arms", [1, 3, 50])
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_all_zero_and_all_one_arms(strategy, n_arms, rate):
    selector = selector_of(strategy, n_arms)
    played = choices(selector, [rate] * n_arms, 200)
    assert all(0 <= arm < n_arms for arm in played)
    if strategy == "ucb1":
        assert set(played) == set(range(n_arms))


@every_strategy
@pytest.mark.parametrize("delay", range(1, 9))
def test_same_seed_and_trace_give_the_same_choices(strategy, delay):
    first, second = selector_of(strategy), selector_of(strategy)
    assert choices(first, RATES, 300, delay=delay) == choices(second, RATES, 300, delay=delay)
    assert first.to_json() == second.to_json()


@every_strategy
@pytest.mark.parametrize("window_size", [0, 40, 500])
@pytest.mark.parametrize("in_flight", [0, 5])
def test_json_round_trip_goes_on_with_the_same_choices(strategy, window_size, in_flight):
    selector = selector_of(strategy, window_size=window_size)
    choices(selector, RATES, 300)
    selector.disable(0)
    late = [selector.select() for _ in range(in_flight)]
    for restored in (
        DraftSelector.from_json(selector.to_json()),
        type(selector).from_json(selector.to_json()),
    ):
        assert type(restored) is type(selector)
        assert restored.to_json() == selector.to_json()
        twin = DraftSelector.from_json(selector.to_json())
        for arm in late:
            restored.update(arm, 1)
            twin.update(arm, 1)
        assert choices(restored, RATES, 200, seed=1) == choices(twin, RATES, 200, seed=1)
    original, copy = selector, DraftSelector.from_json(selector.to_json())
    assert choices(original, RATES, 300, seed=2) == choices(copy, RATES, 300, seed=2)


def test_json_is_refused_by_another_class():
    text = selector_of("ucb1").to_json()
    with pytest.raises(ValueError, match=r"to_json\(\) of a ThompsonSelector.*describes a UCB1Selector"):
        ThompsonSelector.from_json(text)


def change(path, value, document):
    *folders, last = path
    for key in folders:
        document = document[key]
    document[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["selector"], "Selector"),
        (["selector"], ["UCB1Selector"]),
        (["options", "n_arms"], 4),
        (["options", "n_arms"], 10**12),
        (["options", "window_size"], -1),
        (["options", "window_size"], 0),
        (["options", "window_size"], 2),
        (["options", "exploration_constant"], float("nan")),
        (["options", "colour"], 1),
        (["state"], []),
        (["state", "t"], 31),
        (["state", "t"], "30"),
        (["state", "oldest"], 0),
        (["state", "oldest"], 5),
        (["state", "enabled"], []),
        (["state", "enabled"], [3]),
        (["state", "pending"], [[1, 9]]),
        (["state", "pending"], [[99, 0]]),
        (["state", "pending"], [[2, 0], [1, 0]]),
        (["state", "n_selected"], 1.5),
        (["state", "arms", 0], None),
        (["state", "arms", 0, "n_accepted"], 10**6),
        (["state", "arms", 0, "n_drafted"], 0),
        (["state", "arms", 0, "lifetime_pulls"], 0),
        (["state", "arms", 0, "pulls", 0], [1, 2, 1]),
        (["state", "arms", 0, "pulls", 0], [1, 1]),
        (["state", "arms", 0, "pulls", 0], [31, 0, 1]),
        (["state", "arms", 0, "pulls"], 3),
    ],
)
def test_inconsistent_json_raises(path, value):
    selector = selector_of("ucb1")
    choices(selector, RATES, 30)
    document = json.loads(selector.to_json())
    DraftSelector.from_json(json.dumps(document))
    change(path, value, document)
    with pytest.raises(ValueError, match="text should be the to_json"):
        DraftSelector.from_json(json.dumps(document))


def test_one_round_cannot_belong_to_two_arms():
    selector = selector_of("ucb1")
    choices(selector, RATES, 3)
    document = json.loads(selector.to_json())
    change(["state", "arms", 0, "pulls", 0, 0], 2, document)
    with pytest.raises(ValueError, match="t = 3"):
        UCB1Selector.from_json(json.dumps(document))


@pytest.mark.parametrize("random", [None, [3, [1, 2], None], [9, [0] * 625, None], "state"])
def test_damaged_generator_state_raises(random):
    document = json.loads(selector_of("thompson").to_json())
    change(["state", "random"], random, document)
    with pytest.raises(ValueError, match="text should be"):
        ThompsonSelector.from_json(json.dumps(document))


def test_all_history_counts_are_checked_too():
    selector = selector_of("thompson", window_size=0)
    choices(selector, RATES, 30)
    document = json.loads(selector.to_json())
    change(["state", "arms", 1, "n_accepted"], 31, document)
    with pytest.raises(ValueError, match="31 accepted of"):
        ThompsonSelector.from_json(json.dumps(document))


@pytest.mark.parametrize("text", ["", "{", "null", "3", "[]", "{}", "[" * 100_000, '"UCB1Selector"', None, 7])
def test_text_that_is_no_selector_raises(text):
    with pytest.raises(ValueError, match="text should be the to_json"):
        DraftSelector.from_json(text)


def test_truncated_json_raises_at_every_length():
    text = selector_of("ucb1").to_json()
    for length in range(len(text)):
        with pytest.raises(ValueError):
            DraftSelector.from_json(text[:length])


@every_strategy
def test_eight_threads_of_a_hundred_updates(strategy):
    selector = selector_of(strategy)
    failures = []

    def work(seed):
        random = Random(seed)
        try:
            for _ in range(100):
                arm = selector.select()
                selector.update(arm, int(random.random() < RATES[arm]))
                selector.to_json()
        except Exception as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    assert selector.t == sum(stats.lifetime_pulls for stats in selector.stats) == 800
    assert json.loads(selector.to_json())["state"]["pending"] == []


@pytest.mark.parametrize(
    "call",
    [
        partial(UCB1Selector, 0),
        partial(UCB1Selector, -1),
        partial(UCB1Selector, 2.0),
        partial(UCB1Selector, 3, -1),
        partial(ThompsonSelector, 3, 1.5),
        partial(FixedSelector, 3, 0, None),
    ],
)
def test_bad_sizes_raise(call):
    with pytest.raises(ValueError, match=r"n_arms|window_size"):
        call()


@pytest.mark.parametrize("arm", [-1, 3, 1.0, None, float("nan"), "0"])
def test_unknown_arm_raises(arm):
    selector = selector_of("ucb1")
    for call in (
        partial(selector.update, arm, 1),
        partial(selector.disable, arm),
        partial(selector.enable, arm),
    ):
        with pytest.raises(ValueError, match="arm should be"):
            call()


@pytest.mark.parametrize(
    ("accepted", "drafted", "facts"),
    [
        (2, 1, {}),
        (-1, 1, {}),
        (float("nan"), 1, {}),
        (0, -1, {}),
        (1, 2.0, {}),
        (3, 4, {"rows": [(2, 1), (2, 1)]}),
        (3, 4, {"rows": [(2, 3), (2, 0)]}),
        (3, 4, {"rows": [4]}),
        (3, 4, {"rows": [(4, 3, 1)]}),
        (3, 4, {"rows": 7}),
        (3, 4, {"seconds": -0.1}),
        (3, 4, {"seconds": float("inf")}),
        (3, 4, {"seconds": "1"}),
    ],
)
def test_bad_feedback_raises_and_records_nothing(accepted, drafted, facts):
    selector = selector_of("thompson")
    before = selector.to_json()
    with pytest.raises(ValueError):
        selector.update(0, accepted, drafted, **facts)
    assert selector.to_json() == before


def test_policy_hears_the_checked_facts_after_the_counts():
    heard = []

    class Listener(FixedSelector):
        def _begin(self, rows):
            heard.append(rows)

        def _learn(self, step):
            heard.append((step, self._stats[step.arm].n_pulls))

        def _charge(self, arm, seconds):
            heard.append((arm, seconds))

    selector = Listener(2, 1)
    selector.begin(2)
    selector.update(1, 3, 8, rows=[[4, 1], [4, 2]], critical=[True, False], seconds=1)
    selector.update(1, 0, 0)
    selector.give_way(1, 2)
    assert heard == [
        2,
        (Feedback(1, 3, 8, ((4, 1), (4, 2)), [True, False], 1.0), 1),
        (Feedback(1, 0, 0, None, None, None), 2),
        (1, 2.0),
    ]


def test_a_selection_that_gave_way_comes_to_nothing():
    selector = selector_of("thompson")
    arm = selector.select()
    selector.give_way(arm)
    assert selector._outstanding == [0] * selector.n_arms and not selector._pending
    assert selector.t == 0 and selector.stats[arm].n_pulls == 0


@pytest.mark.parametrize("facts", [(9,), (-1,), (0, -1.0), (0, float("nan")), (0, "1")])
def test_giving_way_is_checked(facts):
    selector = selector_of("thompson")
    before = selector.to_json()
    with pytest.raises(ValueError):
        selector.give_way(*facts)
    assert selector.to_json() == before


@pytest.mark.parametrize("rows", [0, -1, 1.5])
def test_a_batch_has_a_whole_number_of_rows(rows):
    with pytest.raises(ValueError, match="rows"):
        selector_of("thompson").begin(rows)


@every_strategy
def test_disabled_arm_is_never_chosen(strategy):
    selector = selector_of(strategy)
    assert 1 in choices(selector, RATES, 100) or strategy == "fixed"
    best = 0 if strategy == "fixed" else 1
    selector.disable(best)
    selector.disable(best)
    assert best not in choices(selector, RATES, 300, seed=1)
    selector.enable(best)
    assert best in choices(selector, RATES, 300, seed=2)


def test_last_enabled_arm_cannot_be_disabled():
    selector = selector_of("ucb1")
    selector.disable(0)
    selector.disable(2)
    with pytest.raises(ValueError, match="arm 1 is the last one enabled"):
        selector.disable(1)
    assert selector.select() == 1


@every_strategy
def test_arms_asleep_are_not_chosen(strategy):
    selector = selector_of(strategy)
    selector.disable(0)
    assert {selector.select([1]) for _ in range(5)} == {2}
    assert {selector.select([0, 2]) for _ in range(5)} == {1}
    with pytest.raises(ValueError, match="asleep names all arms that are enabled"):
        selector.select([1, 2])
    assert selector.enabled == (1, 2)


def test_feedback_of_an_arm_disabled_meanwhile_still_counts():
    selector = selector_of("ucb1")
    arm = selector.select()
    selector.disable(arm)
    selector.update(arm, 1)
    assert (selector.t, selector.stats[arm].n_accepted) == (1, 1)


def test_selections_never_answered_are_written_off():
    selector = UCB1Selector(2)
    for _ in range(10 * MAX_OUTSTANDING):
        selector.select()
    pending = json.loads(selector.to_json())["state"]["pending"]
    assert len(pending) == MAX_OUTSTANDING and pending[-1][0] == 10 * MAX_OUTSTANDING


def test_stale_arm_leaves_the_window():
    selector = FixedSelector(2, 0, window_size=10)
    selector.update(1, 1)
    for _ in range(19):
        selector.update(0, 1)
    assert [stats.n_pulls for stats in selector.stats] == [10, 1]
    selector.update(0, 1)
    assert [stats.n_pulls for stats in selector.stats] == [10, 0]
    assert selector.stats[1].lifetime_pulls == 1


def test_shift_of_the_played_arm_empties_the_other_windows():
    selector = FixedSelector(2, 0)
    for _ in range(50):
        selector.update(0, 1)
        selector.update(1, 1)
    for _ in range(32):
        selector.update(0, 0)
    assert selector.stats[1].n_pulls < 32
    assert selector.stats[0].mean_accept_rate < 0.7


def test_window_zero_forgets_nothing():
    selector = FixedSelector(2, 0, window_size=0)
    for accepted in [1] * 1000 + [0] * 1000:
        selector.update(0, accepted)
    assert (selector.stats[0].n_pulls, selector.stats[0].mean_accept_rate) == (2000, 0.5)


def test_make_selector_hands_on_the_options():
    options = {
        "window_size": 9,
        "exploration_constant": 0.5,
        "prior_alpha": 2.0,
        "prior_beta": 3.0,
        "seed": 4,
    }
    stored = {
        name: json.loads(make_selector(name, 2, true_rates=[0.1, 0.2], **options).to_json())["options"]
        for name in STRATEGIES
    }
    assert stored == {
        "ucb1": {"n_arms": 2, "window_size": 9, "exploration_constant": 0.5},
        "thompson": {"n_arms": 2, "window_size": 9, "prior_alpha": 2.0, "prior_beta": 3.0, "seed": 4},
        "oracle": {"n_arms": 2, "true_rates": [0.1, 0.2], "window_size": 9},
        "fixed": {"n_arms": 2, "arm": 0, "window_size": 9},
    }
    assert isinstance(make_selector("oracle", 1, true_rates=[1.0]), OracleSelector)


@pytest.mark.parametrize(("strategy", "match"), [("oracle", "needs true_rates"), ("ucb2", "got 'ucb2'")])
def test_make_selector_says_what_is_missing(strategy, match):
    with pytest.raises(ValueError, match=match):
        make_selector(strategy, 2)
