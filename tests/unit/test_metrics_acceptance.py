import pytest

from flashspec.metrics import AcceptanceTracker


def test_counts_that_can_be_checked_by_hand() -> None:
    tracker = AcceptanceTracker(gamma=3)
    tracker.record(3)
    tracker.record(1)
    tracker.record(1, drafted=1)
    tracker.record(0, drafted=2)
    assert tracker.n_steps == 4
    assert tracker.acceptance_rate == 5 / 9
    assert tracker.acceptance_length == 1 + 5 / 4
    assert tracker.per_position == [3 / 4, 1 / 3, 1 / 2]


def test_a_step_without_a_draft_counts_for_the_length_alone() -> None:
    tracker = AcceptanceTracker(gamma=2)
    tracker.record(2)
    tracker.record(0, drafted=0)
    assert tracker.acceptance_rate == 1.0
    assert tracker.acceptance_length == 2.0


def test_empty_and_reset() -> None:
    tracker = AcceptanceTracker(gamma=2)
    for _ in range(2):
        assert (tracker.n_steps, tracker.acceptance_rate, tracker.acceptance_length) == (0, 0.0, 0.0)
        assert tracker.per_position == [0.0, 0.0]
        tracker.record(1)
        tracker.reset()


@pytest.mark.parametrize(
    ("accepted", "drafted", "message"),
    [
        (4, None, r"accepted should be in 0\.\.3, the number drafted: got 4"),
        (-1, None, "accepted should be"),
        (2, 1, r"accepted should be in 0\.\.1"),
        (0, 4, r"drafted should be in 0\.\.3: got 4"),
        (0, -1, "drafted should be"),
    ],
)
def test_impossible_counts_are_refused_and_leave_no_trace(accepted: int, drafted: int | None, message: str) -> None:
    tracker = AcceptanceTracker(gamma=3)
    with pytest.raises(ValueError, match=message):
        tracker.record(accepted, drafted)
    assert tracker.n_steps == 0


def test_gamma_is_at_least_one() -> None:
    with pytest.raises(ValueError, match="gamma should be at least 1: got 0"):
        AcceptanceTracker(0)
