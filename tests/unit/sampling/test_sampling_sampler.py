"""A request's settings as tensors, draft choices, and rows that a verdict means nothing for."""

from __future__ import annotations

import pytest
import torch
from statistics_of_text import g_test

from flashspec.config import SamplingConfig
from flashspec.core import Draft
from flashspec.sampling.sampler import Sampler, make_sampler

CPU = torch.device("cpu")
NAN = float("nan")


def sampler_of(rows: int = 1, vocab_size: int = 4, seed: int = 0, **settings: object) -> Sampler:
    return make_sampler(SamplingConfig(**settings), [[0]] * rows, [], vocab_size, seed, CPU)  # type: ignore[arg-type]


def test_transforms_that_are_off_cost_nothing() -> None:
    transforms = sampler_of().transforms
    names = ("top_k", "top_p", "min_p", "bias", "repetition", "prompt_seen", "output_counts", "stop_ids")
    assert all(getattr(transforms, name) is None for name in names) and not transforms.all_greedy


def draw(sampler: Sampler, logits: torch.Tensor, lengths: torch.Tensor, part: torch.Tensor | None = None) -> Draft:
    """A draft of one token from logits (B, V)."""
    rows, size = len(logits), 4
    weights = None if sampler.one_hot_drafts else torch.empty(rows, 1, size)
    column = torch.zeros(rows, dtype=torch.int64)
    draft = Draft(column[:, None].clone(), column, weights, torch.zeros(rows, dtype=torch.bool))
    sampler.draw(logits, draft, 0, lengths, size, part)
    return draft


@pytest.mark.parametrize("settings", [{"logit_bias": {4: 1.0}}, {"logit_bias": {-1: 1.0}}])
def test_a_bias_outside_the_vocabulary_is_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="ids run from 0 to 3"):
        sampler_of(**settings)


def test_rows_have_streams_of_their_own() -> None:
    seeds = [*sampler_of(rows=3, seed=1).seeds.tolist(), *sampler_of(rows=3, seed=2).seeds.tolist()]
    assert len(set(seeds)) == 6 and min(seeds) >= 0
    assert sampler_of(rows=2, seed=2**63 - 1).seeds.min() >= 0


def test_greedy_drafts_are_the_most_likely_tokens() -> None:
    sampler = sampler_of(temperature=0)
    draft = draw(sampler, torch.tensor([[0.0, 3.0, 1.0, 2.0]]), torch.tensor([5]))
    assert draft.logits is None and draft.token_ids.tolist() == [[1]] and draft.lengths.tolist() == [1]


def test_drafts_are_drawn_from_the_weights_that_are_reported() -> None:
    rows = 20_000
    sampler = sampler_of(rows, logit_bias={0: 1.0}, top_k=3, temperature=0.7)
    logits = torch.tensor([0.0, 0.5, -0.5, -1.0]).repeat(rows, 1)
    draft = draw(sampler, logits, torch.full((rows,), 5))
    assert draft.logits is not None and draft.logits[0, 0, 3] == float("-inf")
    assert g_test(draft.token_ids, draft.logits[0, 0].double().softmax(-1)) > 0.001


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.7}, {"variant": "coupled"}, {"top_k": 3}])
def test_drafts_from_a_part_are_those_from_logits_that_rule_the_others_out(settings: dict) -> None:
    rows, part = 50, torch.tensor([0, 3])
    for bias in ({}, {"logit_bias": {1: 9.0, 3: 1.0}}):
        sampler = sampler_of(rows, **settings, **bias)
        logits = torch.randn(rows, 2, generator=torch.Generator().manual_seed(1))
        everything = torch.full((rows, 4), -float("inf")).index_copy(1, part, logits)
        lengths = torch.arange(rows) + 3
        found, expected = draw(sampler, logits, lengths, part), draw(sampler, everything, lengths)
        assert torch.equal(found.token_ids, expected.token_ids) and set(found.token_ids[:, 0].tolist()) == {0, 3}
        assert (found.logits is None) == sampler.one_hot_drafts
        if found.logits is not None and expected.logits is not None:
            assert torch.equal(found.logits, expected.logits)


def test_coupled_drafts_agree_with_the_target_that_is_the_same() -> None:
    rows = 100
    sampler = sampler_of(rows, variant="coupled")
    logits = torch.randn(rows, 2, 4, generator=torch.Generator().manual_seed(1))
    lengths = torch.arange(rows) + 3
    draft = draw(sampler, logits[:, 0], lengths)
    verdict, _ = sampler.verify(logits, draft, lengths)
    assert sampler.one_hot_drafts and verdict.num_accepted.tolist() == [1] * rows


@pytest.mark.parametrize("settings", [{"temperature": 0}, {}, {"variant": "coupled"}, {"variant": "typical"}])
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_only_logits_that_the_verdict_rests_on_must_be_finite(settings: dict, bad: float) -> None:
    logits = torch.full((3, 3, 4), -30.0)
    logits[:, :, 1] = 30.0  # the target is sure of 1
    draft = Draft(torch.tensor([[1, 1], [0, 1], [1, 1]]), torch.full((3,), 2))
    logits[0, 2, 0] = logits[1, 2, 0] = bad  # the second row's draft is refused before it matters
    logits[2, 0, 0] = bad
    _, failed = sampler_of(3, **settings).verify(logits, draft, torch.tensor([4, 4, 4]))
    assert failed.tolist() == [True, False, True]


def test_tokens_that_cannot_be_drawn_are_no_fault() -> None:
    logits = torch.tensor([[[float("-inf"), 0.0, float("-inf"), 1.0]]])
    verdict, failed = sampler_of().verify(logits, Draft.empty(1, CPU), torch.tensor([1]))
    assert failed.tolist() == [False] and verdict.next_token[0] in (1, 3)
