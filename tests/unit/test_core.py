"""The nouns and their arithmetic."""

from __future__ import annotations

import pytest
import torch

from flashspec.core import PLAIN, Arm, Draft, GenerationResult, RowStep, StepRecord


@pytest.mark.parametrize(("name", "arm"), [("plain", PLAIN), ("ngram:4", Arm("ngram", 4)), ("a:b:2", Arm("a:b", 2))])
def test_arms_are_written_as_they_are_read(name: str, arm: Arm) -> None:
    assert Arm.parse(name) == arm and str(arm) == name


@pytest.mark.parametrize("name", ["", "ngram", "ngram:", ":3", "ngram:x", "ngram:-1", "ngram:0", "plain:0"])
def test_what_is_no_arm_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="arm"):
        Arm.parse(name)


@pytest.mark.parametrize(("drafter", "length"), [("", 1), ("ngram", 0), ("ngram", -1)])
def test_an_arm_is_a_drafter_with_a_length_or_neither(drafter: str, length: int) -> None:
    with pytest.raises(ValueError, match="length >= 1"):
        Arm(drafter, length)


def test_an_empty_draft() -> None:
    draft = Draft.empty(3, torch.device("cpu"))
    assert draft.token_ids.shape == (3, 0) and draft.lengths.tolist() == [0, 0, 0]


def test_a_result_counts_its_steps() -> None:
    steps = [
        StepRecord(Arm("ngram", 4), (RowStep(4, 2, 3), RowStep(0, 0, 1)), 0.5),
        StepRecord(PLAIN, (RowStep(0, 0, 1),), 0.25),
    ]
    output_ids = torch.tensor([[1, 2, 3, 4], [5, -1, -1, -1]])
    result = GenerationResult(output_ids, ["length", "stop"], steps, seconds=0.8, texts=["abcd", "e"])
    assert (steps[0].drafted, steps[0].accepted, steps[0].emitted) == (4, 2, 4)
    assert result.n_tokens_generated == 5
    assert result.acceptance_rate == 0.5
    assert result.acceptance_length == pytest.approx(5 / 3)
    assert result.tokens_per_second == pytest.approx(6.25)
    assert result.text == "abcd"
