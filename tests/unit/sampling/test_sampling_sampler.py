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
    token_ids, finite = sampler.draw(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), torch.tensor([5]), None)
    assert sampler.one_hot_drafts and token_ids.tolist() == [1] and finite.tolist() == [True]


def test_drafts_are_drawn_from_the_weights_that_are_reported() -> None:
    rows = 20_000
    sampler = sampler_of(rows, logit_bias={0: 1.0}, top_k=3, temperature=0.7)
    logits = torch.tensor([0.0, 0.5, -0.5, -1.0]).repeat(rows, 1)
    weights = torch.empty_like(logits)
    token_ids, _ = sampler.draw(logits, torch.full((rows,), 5), weights)
    assert not sampler.one_hot_drafts and weights[0, 3] == float("-inf")
    assert g_test(token_ids[:, None], weights[0].double().softmax(-1)) > 0.001


def test_coupled_drafts_agree_with_the_target_that_is_the_same() -> None:
    rows = 100
    sampler = sampler_of(rows, variant="coupled")
    logits = torch.randn(rows, 2, 4, generator=torch.Generator().manual_seed(1))
    lengths = torch.arange(rows) + 3
    token_ids, _ = sampler.draw(logits[:, 0], lengths, None)
    draft = Draft(token_ids[:, None], torch.ones(rows, dtype=torch.int64))
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
