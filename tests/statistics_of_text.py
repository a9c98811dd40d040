"""Goodness of fit of emitted token tuples against the target's exact joint distribution."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from scipy import stats
from torch import Tensor

from flashspec.config import SamplingConfig


def reference_logprobs(logits: Tensor, config: SamplingConfig, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
    """One row of the documented transforms, written the slow and obvious way: (V,) -> (V,) log-probabilities."""
    logits = logits.double().clone()
    for token_id, value in config.logit_bias.items():
        logits[token_id] += value
    for token_id in range(len(logits)):
        count = list(output).count(token_id)
        if count or token_id in prompt:
            penalty = config.repetition_penalty
            logits[token_id] = logits[token_id] / penalty if logits[token_id] > 0 else logits[token_id] * penalty
        logits[token_id] -= config.frequency_penalty * count + config.presence_penalty * (count > 0)
    if config.temperature == 0:
        greedy = torch.full_like(logits, float("-inf"))
        greedy[logits.argmax()] = 0.0
        return greedy
    logits = logits / config.temperature
    if config.top_k > 0:
        logits[logits < logits.sort(descending=True).values[min(config.top_k, len(logits)) - 1]] = float("-inf")
    if config.top_p < 1:
        probs, order = logits.softmax(-1).sort(descending=True)
        outside = probs.cumsum(-1) - probs >= config.top_p
        logits[order[outside]] = float("-inf")
    if config.min_p > 0:
        probs = logits.softmax(-1)
        logits[probs < config.min_p * probs.max()] = float("-inf")
    return logits.log_softmax(-1)


def joint_distribution(
    next_logits: Callable[[list[int]], Tensor], config: SamplingConfig, prompt: list[int], count: int, vocab_size: int
) -> Tensor:
    """Exact probabilities of every tuple of `count` tokens, as (V,) * count, float64."""
    joint = torch.zeros((vocab_size,) * count, dtype=torch.float64)
    for output in itertools.product(range(vocab_size), repeat=count):
        total = 0.0
        for i in range(count):
            row = reference_logprobs(next_logits(prompt + list(output[:i])), config, prompt, output[:i])
            total += float(row[output[i]])
            if total == float("-inf"):
                break
        joint[output] = torch.tensor(total).exp()
    return joint


def g_test(samples: Tensor, joint: Tensor) -> float:
    """p-value of samples (N, n) int64 against joint; cells expected under 5 times are pooled, and 0.0 is returned for
    a tuple that cannot happen."""
    count = samples.shape[1]
    strides = torch.tensor([joint.shape[0] ** (count - 1 - i) for i in range(count)])
    observed = torch.bincount((samples * strides).sum(1), minlength=joint.numel()).double()
    expected = joint.flatten() * len(samples)
    if observed[joint.flatten() < 1e-12].any():
        return 0.0
    small = expected < 5
    cells_observed = torch.cat([observed[~small], observed[small].sum()[None]])
    cells_expected = torch.cat([expected[~small], expected[small].sum()[None]])
    used = cells_expected > 1e-9
    if int(used.sum()) < 2:
        return 1.0
    cells_observed, cells_expected = cells_observed[used], cells_expected[used]
    terms = torch.where(cells_observed > 0, cells_observed * (cells_observed / cells_expected).log(), 0.0)
    return float(stats.chi2.sf(2 * float(terms.sum()), len(cells_observed) - 1))
