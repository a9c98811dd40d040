"""What a forward costs by its width, with a clock that a fake model drives."""

from __future__ import annotations

import pytest
from fakes import MarkovModel

from flashspec.engine import SpeculativeEngine
from flashspec.engine.costs import CostTable, measure_costs


class Slow(MarkovModel):
    """A forward takes 10 s and 2 s a token, the first of each width ten times as long."""

    now = 0.0

    def forward(self, token_ids, positions, cache, bound, num_layers=None, features=None):  # type: ignore[no-untyped-def]
        self.widths = [*getattr(self, "widths", []), token_ids.shape[1]]
        cold = self.widths.count(token_ids.shape[1]) == 1
        self.now += (10 + 2 * token_ids.shape[1]) * (10 if cold else 1)
        return super().forward(token_ids, positions, cache, bound, num_layers)


def test_the_clock_is_read_around_forwards_after_a_warm_up() -> None:
    model = Slow(MarkovModel.random(4, seed=1).table)
    table = measure_costs(model, widths=(1, 3, 6), clock=lambda: model.now)
    assert table.seconds == {1: 12.0, 3: 16.0, 6: 22.0}
    assert table.plain_seconds == 12.0
    assert table.token_cost == pytest.approx(2 / 12)


def test_the_quickest_take_counts() -> None:
    model = MarkovModel.random(4, seed=1)
    ticks = iter([0, 50, 0, 3, 0, 1, 0, 9, 0, 50, 0, 5, 0, 5, 0, 5])
    assert measure_costs(model, widths=(1, 2), clock=lambda: next(ticks)).seconds == {1: 1, 2: 5}


@pytest.mark.parametrize(("rows", "capacity"), [(1, 1024), (2, 64)])
def test_one_row_has_a_workspaces_slots_and_the_text_is_short(
    rows: int, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's kernels depend on the capacity: another would be compiled for nothing."""
    model, seen = MarkovModel.random(4, seed=1, max_context=4096), set[tuple[int, int]]()

    def forward(token_ids, positions, cache, bound, num_layers=None, features=None):  # type: ignore[no-untyped-def]
        seen.add((cache.capacity, bound))
        return MarkovModel.forward(model, token_ids, positions, cache, bound, num_layers)

    monkeypatch.setattr(model, "forward", forward)
    measure_costs(model, rows)
    assert seen == {(capacity, 64)}


def test_a_slope_that_noise_turned_negative_is_a_small_cost() -> None:
    assert CostTable({1: 1.0, 5: 0.9}).token_cost == 1e-3


def test_a_context_smaller_than_the_widths_is_measured_too() -> None:
    assert set(measure_costs(MarkovModel.random(4, seed=1, max_context=4)).seconds) == {1, 5, 9}


def test_other_widths_and_rows_are_on_the_line() -> None:
    table = CostTable({1: 12.0, 3: 16.0, 6: 22.0})
    assert [table.at(width) for width in (1, 2, 16)] == pytest.approx([12, 14, 42])
    batch = table.for_rows(4)
    assert batch.seconds == pytest.approx({1: 18, 3: 34, 6: 58})
    assert batch.token_cost == pytest.approx(8 / 18)


def test_selectors_begin_with_the_costs_of_as_many_rows() -> None:
    engine = SpeculativeEngine(
        {"device": "cpu", "bandit": {"strategy": "auto"}},
        ["suffix", "ngram"],
        MarkovModel.random(4, seed=1),
        arms=["plain", "suffix:15", "ngram:4"],
    )
    engine.costs = CostTable({1: 12.0, 3: 16.0})
    batch = engine.costs.for_rows(4)
    assert engine.selector_for(4)._guesses == [batch.at(1), batch.at(1), batch.at(5)]  # suffix drafts what pays
    assert engine.selector_for(3) is engine.selector_for(4) is not engine.selector_for(1) is engine.selector
