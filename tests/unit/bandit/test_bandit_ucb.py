from math import log, sqrt

import pytest

from flashspec.bandit import UCB1Selector


def test_every_arm_once_then_the_largest_index():
    selector = UCB1Selector(3)
    for expected, accepted in ((0, 1), (1, 3), (2, 2)):
        assert selector.select() == expected
        selector.update(expected, accepted, 4)
    assert selector.select() == 1


@pytest.mark.parametrize(("constant", "expected"), [(0.0, 0), (0.3, 0), (0.5, 1), (1.0, 1)])
def test_index_is_mean_plus_c_sqrt_2_ln_t_over_n(constant, expected):
    selector = UCB1Selector(2, exploration_constant=constant)
    for _ in range(9):
        selector.update(0, 3, 4)
    selector.update(1, 1, 4)
    indices = [0.75 + constant * sqrt(2 * log(10) / 9), 0.25 + constant * sqrt(2 * log(10) / 1)]
    assert indices.index(max(indices)) == expected
    assert selector.select() == expected


@pytest.mark.parametrize("n_arms", [1, 2, 8])
def test_first_pulls_go_round_when_feedback_is_late(n_arms):
    selector = UCB1Selector(n_arms)
    assert [selector.select() for _ in range(n_arms)] == list(range(n_arms))
    later = [selector.select() for _ in range(2 * n_arms)]
    assert sorted(later) == sorted(list(range(n_arms)) * 2)


@pytest.mark.parametrize("constant", [-1.0, float("nan"), float("inf"), True, "1"])
def test_bad_constant_raises(constant):
    with pytest.raises(ValueError, match="exploration_constant"):
        UCB1Selector(2, exploration_constant=constant)
