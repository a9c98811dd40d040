from random import Random

import pytest

from flashspec.bandit import ArmStats
from flashspec.bandit.estimates import SHIFT_BLOCK, real_number, whole_number


def test_counts_and_mean_agree():
    stats = ArmStats()
    assert stats.mean_accept_rate == 0.0
    stats.record(3, 4)
    stats.record(0, 2)
    stats.record(1)
    assert (stats.n_pulls, stats.n_accepted, stats.n_drafted) == (3, 4, 7)
    assert stats.mean_accept_rate == 4 / 7
    assert stats.window == ((3, 4), (0, 2), (1, 1))


def test_window_keeps_the_last_pulls():
    stats = ArmStats(window_size=3)
    for accepted in (1, 1, 0, 0, 1):
        stats.record(accepted)
    assert stats.window == ((0, 1), (0, 1), (1, 1))
    assert (stats.n_pulls, stats.n_accepted, stats.lifetime_pulls) == (3, 1, 5)


def test_window_zero_is_all_history_in_constant_space():
    stats = ArmStats(window_size=0)
    for _ in range(2000):
        stats.record(1, 2)
    stats.expire(1999)
    assert (stats.n_pulls, stats.n_accepted, stats.n_drafted) == (2000, 2000, 4000)
    assert stats.window == ()


def test_pull_without_a_draft_is_no_evidence():
    stats = ArmStats()
    stats.record(0, 0)
    assert (stats.n_pulls, stats.mean_accept_rate) == (1, 0.0)
    stats.record(2, 2)
    assert stats.mean_accept_rate == 1.0


def test_expire_forgets_by_round():
    stats = ArmStats()
    for at in (2, 5, 9):
        stats.record(1, at=at)
    stats.expire(6)
    assert (stats.n_pulls, stats.n_accepted, stats.lifetime_pulls) == (1, 1, 3)


def test_copy_stands_alone():
    stats = ArmStats()
    stats.record(1)
    twin = stats.copy()
    stats.record(0)
    assert (twin.window, twin.mean_accept_rate) == (((1, 1),), 1.0)


@pytest.mark.parametrize(
    ("accepted", "drafted"),
    [
        (-1, 1),
        (2, 1),
        (1, -1),
        (0.5, 1),
        (1, 1.0),
        (float("nan"), 1),
        ("1", 1),
        (None, 1),
    ],
)
def test_bad_counts_raise_and_leave_no_mark(accepted, drafted):
    stats = ArmStats()
    with pytest.raises(ValueError, match=r"accepted|drafted"):
        stats.record(accepted, drafted)
    assert (stats.n_pulls, stats.n_accepted, stats.n_drafted, stats.window) == (0, 0, 0, ())


@pytest.mark.parametrize("window_size", [-1, 2.0, None])
def test_bad_window_raises(window_size):
    with pytest.raises(ValueError, match="window_size"):
        ArmStats(window_size)


def fed(accepts, drafted=1, window_size=500):
    stats = ArmStats(window_size)
    for accepted in accepts:
        stats.record(accepted, drafted)
    return stats


def test_shift_points_at_the_recent_block():
    assert fed([1] * 100 + [0] * SHIFT_BLOCK).shift() == 101
    assert fed([0] * 100 + [4] * SHIFT_BLOCK, drafted=4).shift() == 101


def test_shift_needs_two_blocks_and_a_window():
    assert fed([1] * (SHIFT_BLOCK - 1) + [0] * SHIFT_BLOCK).shift() is None
    assert fed([1] * SHIFT_BLOCK + [0] * SHIFT_BLOCK).shift() == SHIFT_BLOCK + 1
    assert fed([1] * 100 + [0] * SHIFT_BLOCK, window_size=0).shift() is None


def test_shift_is_silent_on_constant_and_on_empty_feedback():
    assert fed([1] * 200).shift() is None
    assert fed([0] * 200).shift() is None
    assert fed([0] * 200, drafted=0).shift() is None


@pytest.mark.parametrize("window_size", [20, SHIFT_BLOCK, SHIFT_BLOCK + 1, 100])
def test_the_recent_block_is_counted_as_it_moves(window_size):
    random = Random(window_size)
    stats = ArmStats(window_size)
    for at in range(1, 400):
        drafted = random.randint(0, 6)
        stats.record(random.randint(0, drafted), drafted, at=at)
        if random.random() < 0.05:
            stats.expire(at - random.randint(0, 60))
        recent = stats.window[-SHIFT_BLOCK:]
        assert stats.copy().shift() == stats.shift() and stats.copy()._recent == (
            sum(accepted for accepted, _ in recent),
            sum(drafted for _, drafted in recent),
        )


@pytest.mark.parametrize(("before", "after", "at_most"), [(0.9, 0.1, 24), (0.7, 0.3, 64)])
def test_shift_is_seen_soon_and_rarely_imagined(before, after, at_most):
    delays, false_alarms = [], 0
    for seed in range(20):
        random = Random(seed)
        stats = ArmStats()
        for _ in range(500):
            stats.record(int(random.random() < before))
            false_alarms += stats.shift() is not None
        delay = 0
        while stats.shift() is None and delay < 200:
            stats.record(int(random.random() < after))
            delay += 1
        delays.append(delay)
    assert sorted(delays)[10] <= at_most
    assert false_alarms <= 20  # of 10,000 pulls; an alarm that nobody acts on repeats itself


@pytest.mark.parametrize("value", [1.0, "1", None, float("nan"), 0])
def test_whole_number_names_the_field_and_the_value(value):
    with pytest.raises(ValueError, match=f"n_arms should be an integer >= 1, got {value!r}"):
        whole_number("n_arms", value, 1)


@pytest.mark.parametrize("value", [True, "1", None, float("nan"), float("inf"), 10**400, -0.1, 1.1])
def test_real_number_takes_finite_numbers_in_range(value):
    assert real_number("rate", 1, 0.0, 1.0) == 1.0
    with pytest.raises(ValueError, match=r"rate should be a finite number in \[0, 1\]"):
        real_number("rate", value, 0.0, 1.0)
