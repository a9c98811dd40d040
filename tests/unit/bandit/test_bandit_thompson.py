from random import Random

import pytest
from scipy.stats import beta as beta_law
from scipy.stats import kstest

from flashspec.bandit import ThompsonSelector
from flashspec.bandit.thompson import sample_beta

LAWS = [(1, 1), (1, 9), (7, 1), (1.5, 1.2), (3, 2), (40, 360), (2000, 1500), (0.5, 0.5), (0.3, 4)]


@pytest.mark.parametrize(("alpha", "beta"), LAWS)
def test_sample_follows_the_beta_law(alpha, beta):
    random = Random(11)
    draws = [sample_beta(random, alpha, beta) for _ in range(20_000)]
    assert kstest(draws, beta_law(alpha, beta).cdf).pvalue > 0.01 / len(LAWS)


def test_the_law_test_notices_a_count_too_many():
    random = Random(11)
    draws = [sample_beta(random, 4, 2) for _ in range(20_000)]
    assert kstest(draws, beta_law(3, 2).cdf).pvalue < 1e-6


def first_choices(selector, n):
    return [selector.select() for _ in range(n)]


def test_choices_follow_the_posterior():
    """P(A > B) = 5/6 for A ~ Beta(2, 1) and B ~ Beta(1, 2), integrated by hand."""
    selector = ThompsonSelector(2, seed=3)
    selector.update(0, 1)
    selector.update(1, 0)
    share = first_choices(selector, 20_000).count(0) / 20_000
    assert abs(share - 5 / 6) < 4 * (5 / 36 / 20_000) ** 0.5


def test_prior_is_used():
    selector = ThompsonSelector(2, prior_alpha=1000.0, prior_beta=1.0, seed=0)
    selector.update(1, 0, 2000)
    assert set(first_choices(selector, 100)) == {0}


def test_seeds_differ_and_no_seed_draws_one():
    rows = [first_choices(ThompsonSelector(5, seed=seed), 40) for seed in (1, 1, 2, None, None)]
    assert rows[0] == rows[1]
    assert len({tuple(row) for row in rows}) == 4


@pytest.mark.parametrize("name", ["prior_alpha", "prior_beta"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), True, "1"])
def test_bad_prior_raises(name, value):
    with pytest.raises(ValueError, match=name):
        ThompsonSelector(2, **{name: value})


@pytest.mark.parametrize("seed", [-1, 1.5, "1"])
def test_bad_seed_raises(seed):
    with pytest.raises(ValueError, match="seed"):
        ThompsonSelector(2, seed=seed)
