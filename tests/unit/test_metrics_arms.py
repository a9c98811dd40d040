"""Three steps that can be added up by hand."""

import pytest

from flashspec.core import PLAIN, Arm, RowStep, StepRecord
from flashspec.metrics.arms import summarise_arms

NGRAM = Arm("ngram", 4)
STEPS = [
    StepRecord(PLAIN, (RowStep(0, 0, 1), RowStep(0, 0, 1)), 0.5),
    StepRecord(NGRAM, (RowStep(4, 1, 2), RowStep(2, 2, 3)), 0.5),
    StepRecord(NGRAM, (RowStep(4, 3, 4),), 1.0),
]


def test_the_most_played_arm_comes_first_with_its_sums():
    ngram, plain = summarise_arms(STEPS)
    assert (ngram.arm, ngram.steps, ngram.drafted, ngram.accepted, ngram.emitted, ngram.seconds) == (
        "ngram:4",
        2,
        10,
        6,
        9,
        1.5,
    )
    assert ngram.share == pytest.approx(2 / 3)
    assert ngram.acceptance_rate == pytest.approx(0.6)
    assert ngram.tokens_per_second == pytest.approx(6.0)
    assert (plain.arm, plain.acceptance_rate, plain.tokens_per_second) == ("plain", 0.0, 4.0)


def test_as_dict_holds_the_rates_too():
    assert summarise_arms(STEPS)[1].as_dict() == {
        "arm": "plain",
        "steps": 1,
        "share": pytest.approx(1 / 3),
        "drafted": 0,
        "accepted": 0,
        "emitted": 2,
        "seconds": 0.5,
        "acceptance_rate": 0.0,
        "tokens_per_second": 4.0,
    }


def test_no_steps_and_no_time_divide_nothing():
    assert summarise_arms([]) == []
    assert summarise_arms([StepRecord(PLAIN, (RowStep(0, 0, 1),), 0.0)])[0].tokens_per_second == 0.0
