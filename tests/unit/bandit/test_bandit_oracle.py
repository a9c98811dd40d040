import pytest

from flashspec.bandit import OracleSelector


def test_plays_the_best_rate_whatever_it_hears():
    selector = OracleSelector(3, [0.2, 0.9, 0.4])
    for _ in range(20):
        assert selector.select() == 1
        selector.update(1, 0)
    selector.set_true_rates([0.2, 0.1, 0.4])
    assert selector.select() == 2
    selector.disable(2)
    assert selector.select() == 0


def test_first_of_equals():
    assert OracleSelector(3, [0.4, 0.7, 0.7]).select() == 1


@pytest.mark.parametrize("rates", [[0.5], [0.5] * 3, [0.5, 1.1], [0.5, -0.1], [0.5, float("nan")], [0.5, True]])
def test_bad_rates_raise_and_change_nothing(rates):
    with pytest.raises(ValueError, match="true_rates"):
        OracleSelector(2, rates)
    selector = OracleSelector(2, [0.1, 0.2])
    with pytest.raises(ValueError, match="true_rates"):
        selector.set_true_rates(rates)
    assert selector.select() == 1
