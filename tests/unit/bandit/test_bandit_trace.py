from io import StringIO
from math import log, pi
from random import Random

import pytest
from bernoulli import play_bernoulli

from flashspec.bandit import FixedSelector, OracleSelector, ThompsonSelector, UCB1Selector
from flashspec.bandit.trace import (
    Decision,
    cumulative_regret,
    play,
    read_trace,
    replay,
    ucb1_regret_bound,
    write_trace,
)

RATES = (0.3, 0.7, 0.5)


def test_trace_round_trip():
    trace = [Decision(0, 1), Decision(2, 3, 8, ((4, 1), (4, 2)), 0.25), Decision(1, 0, 0, (), 0.0)]
    file = StringIO()
    write_trace(file, trace[:1])
    write_trace(file, trace[1:])
    assert file.getvalue().count("\n") == 3
    file.seek(0)
    assert read_trace(file) == trace


@pytest.mark.parametrize(
    "line", ["", "{", "[1]", "{}", '{"arm": 0, "rows": null}', '{"rows": [1]}', '{"rows": null, "x": 1}']
)
def test_damaged_trace_names_the_line(line):
    file = StringIO()
    write_trace(file, [Decision(0, 1)])
    file.write(line + "\n")
    file.seek(0)
    with pytest.raises(ValueError, match="line 2 of the trace"):
        read_trace(file)


@pytest.mark.parametrize("delay", [0, 1, 8])
def test_answers_arrive_late_and_all_arrive(delay):
    arrived = []

    class Listener(FixedSelector):
        def _learn(self, step):
            arrived.append(step.accepted)

    answers = iter(range(20))
    behind = []

    def respond(arm):
        behind.append(len(behind) - len(arrived))
        return Decision(arm, next(answers), 20)

    played = play(Listener(2, 1), respond, 20, delay)
    assert [decision.accepted for decision in played] == arrived == list(range(20))
    assert max(behind) == delay


@pytest.mark.parametrize("kind", [UCB1Selector, ThompsonSelector])
@pytest.mark.parametrize("delay", [0, 3])
def test_replay_of_its_own_trace_repeats_it(kind, delay):
    seeds = {"seed": 5} if kind is ThompsonSelector else {}
    trace = play_bernoulli(kind(3, **seeds), RATES, 500, Random(1), delay)
    assert replay(kind(3, **seeds), trace, delay) == trace


def test_replay_of_another_policy_uses_each_record_once():
    trace = play_bernoulli(UCB1Selector(3), RATES, 500, Random(1))
    replayed = replay(OracleSelector(3, RATES), trace)
    assert replayed == [decision for decision in trace if decision.arm == 1]


def test_replay_needs_an_arm_for_every_record():
    with pytest.raises(ValueError, match="plays arm 3, but the selector has 3 arms"):
        replay(UCB1Selector(3), [Decision(3, 1)])


def test_regret_by_hand():
    trace = [Decision(1, 0), Decision(0, 1), Decision(2, 1), Decision(1, 1)]
    assert cumulative_regret(trace, RATES) == pytest.approx([0.0, 0.4, 0.6, 0.6])
    assert cumulative_regret([], RATES) == []


def test_bound_by_hand():
    expected = 8 * log(100) / 0.4 + 8 * log(100) / 0.2 + (1 + pi**2 / 3) * 0.6
    assert ucb1_regret_bound(RATES, 100) == pytest.approx(expected)
    assert ucb1_regret_bound([0.5, 0.5], 100) == 0.0
