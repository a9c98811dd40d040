"""Prompt lookup, by hand."""

from __future__ import annotations

import pytest
import torch

from flashspec.drafters.ngram import NgramDrafter
from flashspec.kernels import look_up


def continuation(text: list[int], length: int = 4, max_ngram: int = 3, min_ngram: int = 1, bound: int = 0) -> list[int]:
    """What is proposed after one text, empty if nothing; garbage lies behind the text."""
    tokens = torch.tensor([text + [9, 8, 7] * 10])
    ids, found = look_up(tokens, torch.tensor([len(text)]), bound or len(text), length, max_ngram, min_ngram)
    assert ids.shape == (1, length)
    return ids[0].tolist() if found[0] else []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 1, 2], [3, 4, 5, 6]),
        ([1, 2, 5, 0, 3, 2, 6, 0, 1, 2], [5, 0, 3, 2]),  # the longest match wins: (1, 2) over a later 2
        ([4, 1, 0, 0, 0, 4, 2, 0, 0, 0, 4], [2, 0, 0, 0]),  # the latest of equals wins
        ([1, 2, 3, 1, 2, 3, 1, 2], [3, 1, 2, 3]),  # up to the end of the text, then around again
        ([5, 7, 7], [7, 7, 7, 7]),
        ([1, 2, 1], [2, 1, 2, 1]),
        ([1, 2, 3, 4], []),
        ([1], []),
        ([1, 1], [1, 1, 1, 1]),
    ],
)
def test_examples(text: list[int], expected: list[int]) -> None:
    assert continuation(text) == expected


def test_a_match_must_be_long_enough() -> None:
    text = [1, 2, 3, 9, 2]
    assert continuation(text) == [3, 9, 2, 3]
    assert continuation(text, min_ngram=2) == []
    assert continuation([1, 2, 3, 9, 1, 2], min_ngram=2) == [3, 9, 1, 2]


def test_longer_matches_are_not_told_apart_beyond_max_ngram() -> None:
    text = [1, 2, 3, 4, 0, 9, 3, 4, 5, 0, 2, 3, 4]
    assert continuation(text, max_ngram=3)[0] == 0
    assert continuation(text, max_ngram=2)[0] == 5


@pytest.mark.parametrize("length", [1, 2, 7])
def test_as_many_as_asked_for(length: int) -> None:
    assert continuation([1, 2, 3, 1], length) == [2, 3, 1, 2, 3, 1, 2][:length]


def test_garbage_behind_a_shorter_row_is_not_matched() -> None:
    tokens = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 0, 0], [5, 6, 7, 5, 5, 5, 5, 5, 5]])
    ids, found = look_up(tokens, torch.tensor([7, 3]), 7, 2, 3, 1)
    assert found.tolist() == [2, 0] and ids[0].tolist() == [2, 3]
    assert continuation([1, 2, 3], bound=20) == []


@pytest.mark.parametrize(("max_ngram", "min_ngram"), [(3, 0), (2, 3), (0, 0)])
def test_bad_sizes_are_refused(max_ngram: int, min_ngram: int) -> None:
    with pytest.raises(ValueError, match="min_ngram"):
        NgramDrafter(max_ngram, min_ngram)
