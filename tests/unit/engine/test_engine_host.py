"""What the host does a row and step: on a GPU a large batch waits for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from decoding import engine_of
from fakes import MarkovModel

from flashspec.core import RowStep

TARGET = MarkovModel.random(6, seed=51)


def count_calls(work: Callable[[], Any]) -> int:
    """Python functions entered, generators resumed included."""
    calls = 0

    def note(_: object, event: str, __: object) -> None:
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


def test_a_plain_step_makes_few_calls_a_row() -> None:
    """Objects a row took 25 µs, which is 27 ms of 1,024 rows; the forward of such a step takes 5."""
    engine = engine_of(TARGET, arms=["plain"])
    engine.metrics.acceptance = engine.metrics.throughput = engine.metrics.latency = None

    def work(rows: int, steps: int) -> Callable[[], Any]:
        return lambda: list(engine.stream([[1]] * rows, steps).records())

    work(1, 1)()
    few, more = (count_calls(work(rows, 9)) - count_calls(work(rows, 4)) for rows in (8, 40))
    assert (more - few) / (32 * 5) <= 4


def test_rows_that_did_the_same_share_a_record() -> None:
    record = next(engine_of(TARGET, arms=["plain"]).stream([[1], [2]], 3).records())
    assert record.rows == (RowStep(0, 0, 1),) * 2 and record.rows[0] is record.rows[1]


def test_records_left_early_end_the_call_behind_a_whole_step() -> None:
    engine = engine_of(TARGET)
    stream = engine.stream([[1], [2]], 9)
    for record in stream.records():
        assert [row.emitted for row in record.rows] == [1, 1]
        if len(stream.steps) == 3:
            break
    assert engine.generate([[1]], 2).n_tokens_generated == 2  # free again
    result = stream.result()
    assert result.output_ids.shape == (2, 3) and result.finish_reasons == ["cancelled"] * 2
    assert result.output_ids.tolist() == engine.generate([[1], [2]], 3).output_ids.tolist()
    assert list(stream) == [] and list(stream.records()) == []
