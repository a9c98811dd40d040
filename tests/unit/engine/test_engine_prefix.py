"""The caches that a conversation keeps between its turns."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fakes import MarkovModel

from flashspec.engine.prefix import ROUND, PrefixCache
from flashspec.models.reader import Reader

MODEL = MarkovModel.random(6, seed=61, max_context=3000)
TEXT = [1, 2, 3, 4, 5, 1, 2]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def after_a_turn(text: list[int] = TEXT, lag: int = 0) -> tuple[PrefixCache, Reader]:
    """A cache that has kept a reader which read all of the text that it should."""
    memory = PrefixCache()
    reader = memory.borrow(MODEL, text, len(text), len(text) + 5, lag)
    reader.catch_up(torch.tensor([text]), torch.tensor([len(text)]), len(text))
    reader.advance(0)
    memory.keep(text, [reader])
    return memory, reader


def test_a_first_reader_has_read_nothing() -> None:
    reader = PrefixCache().borrow(MODEL, TEXT, len(TEXT), 20, lag=0)
    assert (int(reader.cached), reader.stale, reader.cache.capacity) == (0, 6, ROUND)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ([*TEXT, 3, 3], 6),  # all but the last token of the turn before was read
        (TEXT, 6),
        ([1, 2, 3, 0, 5, 1, 2, 3], 3),  # up to where the texts part
        ([1, 2], 1),  # the last token is never read ahead of a step
        ([5, 5, 5], 0),
    ],
)
def test_what_the_texts_share_is_not_read_again(text: list[int], kept: int) -> None:
    memory, first = after_a_turn()
    reader = memory.borrow(MODEL, text, len(text), 20, lag=0)
    assert reader is first
    assert (int(reader.cached), reader.stale) == (kept, len(text) - 1 - kept)


def test_a_drafters_reader_may_be_one_token_behind() -> None:
    memory, _ = after_a_turn(lag=1)
    assert int(memory.borrow(MODEL, [*TEXT, 3], 8, 20, lag=1).cached) == 5


def test_a_reader_that_sat_out_has_read_less() -> None:
    memory, reader = after_a_turn()
    reader.advance(4)  # another arm wrote four tokens
    text = [*TEXT, 3, 3, 3, 3]
    memory.keep(text, [reader])
    assert int(memory.borrow(MODEL, [*text, 0], 12, 20, lag=0).cached) == 6


def test_readers_are_told_apart_by_model_and_lag_and_lent_once() -> None:
    memory, first = after_a_turn()
    other = MarkovModel.random(6, seed=62)
    assert memory.borrow(other, TEXT, 7, 20, lag=0) is not first
    assert memory.borrow(MODEL, TEXT, 7, 20, lag=1) is not first
    assert memory.borrow(MODEL, TEXT, 7, 20, lag=0) is first
    assert memory.borrow(MODEL, TEXT, 7, 20, lag=0) is not first


def test_a_cache_grows_in_rounds_up_to_the_context() -> None:
    memory, _ = after_a_turn()
    reader = memory.borrow(MODEL, TEXT, 7, ROUND + 1, lag=0)
    assert reader.cache.capacity == 2 * ROUND
    assert reader.cache.keys[0, 0, 0, :6, 0].int().tolist() == TEXT[:6]
    memory.keep(TEXT, [reader])
    assert memory.borrow(MODEL, TEXT, 7, 3000, lag=0).cache.capacity == 3000
