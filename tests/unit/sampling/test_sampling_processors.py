"""The transforms against the slow and obvious ones, at every draft position."""

from __future__ import annotations

from math import log

import pytest
import torch
from statistics_of_text import reference_logprobs
from torch import Tensor

from flashspec.config import SamplingConfig
from flashspec.kernels.reference_fused import keep_nucleus
from flashspec.sampling.processors import NEVER
from flashspec.sampling.sampler import Sampler, make_sampler

CPU = torch.device("cpu")
SETTINGS = {
    "nothing": {},
    "greedy": {"temperature": 0.0},
    "cold": {"temperature": 0.2},
    "hot": {"temperature": 3.0},
    "top-k": {"top_k": 5},
    "top-k of one": {"top_k": 1},
    "top-k beyond the vocabulary": {"top_k": 1000},
    "top-k off": {"top_k": -1},
    "top-p": {"top_p": 0.6},
    "tiny top-p": {"top_p": 1e-6},
    "min-p": {"min_p": 0.1},
    "min-p of one": {"min_p": 1.0},
    "repetition": {"repetition_penalty": 1.7},
    "repetition encouraged": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 1.1},
    "frequency": {"frequency_penalty": -0.8},
    "bias": {"logit_bias": {0: 2.0, 7: -3.5}},
    "all": {
        "temperature": 1.4,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.6,
        "logit_bias": {3: 1.0},
    },
    "greedy with penalties": {"temperature": 0.0, "frequency_penalty": 1.5, "repetition_penalty": 1.3},
}


def sampler_of(
    config: SamplingConfig, prompts: list[list[int]], vocab_size: int, stop_ids: list[int] | None = None
) -> Sampler:
    return make_sampler(config, prompts, stop_ids or [], vocab_size, 0, CPU)


def log_probabilities(sampler: Sampler, logits: Tensor, positions: Tensor, draft_ids: Tensor) -> Tensor:
    """(B, Q, V)."""
    return weights_of(sampler, sampler.transforms.shift(logits, positions, draft_ids)).log_softmax(-1)


def weights_of(sampler: Sampler, shifted: Tensor) -> Tensor:
    """Log-weights (B, Q, V) as verification takes them from shifted logits."""
    temperature = sampler.transforms.temperature[:, None, None]
    floors = torch.tensor(NEVER) if sampler.transforms.floors(shifted) is None else sampler.transforms.floors(shifted)
    if sampler.transforms.all_greedy:
        return torch.full_like(shifted, NEVER).scatter_(-1, shifted.argmax(-1, keepdim=True), 0.0)
    return (shifted / temperature).masked_fill(shifted < floors[..., None], NEVER)


@pytest.mark.parametrize("vocab_size", [12, 101])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_every_draft_position_is_transformed_as_documented(settings: dict, vocab_size: int) -> None:
    config = SamplingConfig(**{"temperature": 1.0, **settings})
    generator = torch.Generator().manual_seed(vocab_size)
    prompts = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in (1, 4, 9)]
    outputs = [torch.randint(vocab_size, (5,), generator=generator).tolist() for _ in prompts]
    draft = torch.randint(vocab_size, (3, 4), generator=generator)  # (B, γ)
    draft[:, 2] = draft[:, 0]  # a token that the draft itself repeats
    logits = 2 * torch.randn(3, 5, vocab_size, generator=generator)  # (B, γ + 1, V)
    sampler = sampler_of(config, prompts, vocab_size)
    sampler.transforms.count(torch.tensor(outputs), torch.full((3,), 5))
    ours = log_probabilities(sampler, logits, torch.zeros(3, 5, dtype=torch.int64), draft)
    for row in range(3):
        for place in range(5):
            written = outputs[row] + draft[row, :place].tolist()
            expected = reference_logprobs(logits[row, place], config, prompts[row], written)
            torch.testing.assert_close(ours[row, place].double(), expected, atol=2e-5, rtol=1e-5)


def test_tokens_that_were_not_kept_are_not_counted() -> None:
    sampler = sampler_of(SamplingConfig(frequency_penalty=1.0), [[0]], 4)
    sampler.transforms.count(torch.tensor([[1, 1, 2]]), torch.tensor([2]))
    assert sampler.transforms.output_counts is not None
    assert sampler.transforms.output_counts.tolist() == [[0, 2, 0, 0]]


@pytest.mark.parametrize("draw", range(20))
def test_the_nucleus_is_the_smallest_that_holds_enough(draw: int) -> None:
    generator = torch.Generator().manual_seed(draw)
    weights = 3 * torch.randn(4, 300, generator=generator)
    top_p = torch.rand(4, 1, generator=generator)
    kept = keep_nucleus(weights, top_p) > NEVER
    for row in range(4):
        probs = weights[row].double().softmax(-1)
        inside = probs[kept[row]]
        assert inside.min() > probs[~kept[row]].max()
        assert inside.sum() >= top_p[row] - 1e-6 and inside.sum() - inside.min() < top_p[row] + 1e-6


@pytest.mark.parametrize(
    ("probs", "top_p", "kept"),
    [
        ([0.4, 0.2, 0.2, 0.2], 0.5, [1, 1, 1, 1]),  # ties at the edge stay, all of them
        ([0.4, 0.2, 0.2, 0.2], 0.3, [1, 0, 0, 0]),
        ([0.25, 0.25, 0.25, 0.25], 0.1, [1, 1, 1, 1]),
        ([0.5, 0.3, 0.1, 0.1], 0.75, [1, 1, 0, 0]),
        ([0.5, 0.3, 0.1, 0.1], 0.85, [1, 1, 1, 1]),
        ([1.0, 0.0, 0.0, 0.0], 0.999, [1, 0, 0, 0]),
        ([0.7, 0.3, 0.0, 0.0], 1.0, [1, 1, 0, 0]),
    ],
)
def test_nuclei_by_hand(probs: list[float], top_p: float, kept: list[int]) -> None:
    weights = keep_nucleus(torch.tensor([probs]).log(), torch.tensor([[top_p]]))
    assert (weights > NEVER).int().tolist() == [kept]


def test_ties_at_the_edge_of_top_k_stay() -> None:
    sampler = sampler_of(SamplingConfig(top_k=2), [[0]], 4)
    weights = weights_of(sampler, torch.tensor([[[3.0, 1.0, 1.0, 0.0]]]))
    assert (weights > NEVER).tolist() == [[[True, True, True, False]]]


def test_min_p_is_relative_to_the_most_likely() -> None:
    sampler = sampler_of(SamplingConfig(min_p=0.5), [[0]], 3)
    weights = weights_of(sampler, torch.tensor([[[0.0, log(0.51), log(0.49)]]]))
    assert (weights > NEVER).tolist() == [[[True, True, False]]]


def test_stop_tokens_wait_for_min_tokens_at_each_position() -> None:
    """Two prompts of different lengths; four tokens must come first."""
    sampler = sampler_of(SamplingConfig(min_tokens=4), [[0, 0], [0]], 5, stop_ids=[1, 3])
    positions = torch.tensor([[4, 5, 6, 7], [4, 5, 6, 7]])  # text positions being decided
    shifted = sampler.transforms.shift(torch.zeros(2, 4, 5), positions, torch.zeros(2, 3, dtype=torch.int64))
    barred = (shifted == NEVER)[..., 1]
    assert barred.tolist() == [[True, True, False, False], [True, False, False, False]]
    assert torch.equal(barred, (shifted == NEVER)[..., 3]) and not (shifted == NEVER)[..., [0, 2, 4]].any()


def test_rows_may_have_a_top_k_of_their_own() -> None:
    sampler = sampler_of(SamplingConfig(top_k=3), [[0], [0], [0]], 4)
    sampler.transforms.top_k = torch.tensor([1, 3, 0])
    weights = weights_of(sampler, torch.tensor([[[4.0, 3.0, 2.0, 1.0]]]).expand(3, 1, 4))
    assert (weights > NEVER).sum(-1).tolist() == [[1], [3], [4]]
