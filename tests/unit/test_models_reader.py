"""A cache that may be behind the text, never wrong."""

from __future__ import annotations

import pytest
import torch
from fakes import MarkovModel

from flashspec.models.reader import Reader

TEXTS = [[1, 2, 3, 4, 1, 2, 3], [4, 3], [2, 2, 2, 2, 2]]
LENGTHS = torch.tensor([len(text) for text in TEXTS])
TOKENS = torch.tensor([text + [0] * (12 - len(text)) for text in TEXTS])


def reader_of(lag: int = 0, capacity: int = 10) -> Reader:
    return Reader(MarkovModel.random(5, seed=1), len(TEXTS), capacity, lag)


def held(reader: Reader, row: int) -> list[int]:
    """The tokens that a row's cache vouches for."""
    return reader.cache.keys[0, row, 0, : int(reader.cached[row]), 0].int().tolist()


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
@pytest.mark.parametrize("lag", [0, 1])
def test_catching_up_reads_all_but_the_last_token(chunk: int, lag: int) -> None:
    reader = reader_of(lag)
    reader.stale = 6
    reader.catch_up(TOKENS, LENGTHS, 7, chunk)
    assert reader.stale <= lag
    for row, text in enumerate(TEXTS):
        assert held(reader, row) == text[: len(held(reader, row))]
        assert len(held(reader, row)) >= len(text) - 1 - lag


def test_nothing_is_read_twice() -> None:
    reader = reader_of()
    reader.stale = 6
    reader.catch_up(TOKENS, LENGTHS, 7)
    reader.cache.keys.fill_(-1.0)
    reader.catch_up(TOKENS, LENGTHS, 7)
    assert (reader.cache.keys == -1).all()


def test_rewinding_forgets_what_lies_behind_the_text() -> None:
    reader = reader_of()
    reader.cached.copy_(torch.tensor([9, 1, 0]))
    reader.rewind(torch.tensor([4, 4, 4]))
    assert reader.cached.tolist() == [3, 1, 0]


def test_who_sits_out_falls_behind() -> None:
    reader = reader_of(lag=1)
    reader.catch_up(TOKENS, LENGTHS, 7)
    reader.advance(3)
    assert reader.stale == 1  # it took part: as stale as a step leaves it
    reader.advance(3)
    reader.advance(2)
    assert reader.stale == 6


def test_growing_keeps_what_was_read() -> None:
    reader = reader_of()
    reader.stale = 6
    reader.catch_up(TOKENS, LENGTHS, 7)
    before = [held(reader, row) for row in range(3)]
    reader.grow(8)  # smaller than it is
    assert reader.cache.capacity == 10
    reader.grow(20)
    assert reader.cache.capacity == 20 and [held(reader, row) for row in range(3)] == before


def test_positions_behind_the_cache_fall_on_its_last_slot() -> None:
    reader = reader_of(capacity=4)
    reader.read(TOKENS[:, :3], torch.tensor([[2, 3, 4]] * 3), bound=9)
    assert reader.cache.keys[0, 0, 0, 2, 0] == 1
    assert reader.cached.tolist() == [4, 4, 4]
