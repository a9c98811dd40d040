"""Coupled verification: drafter and target draw with the same noise (Daliri, Musco and Suresh 2024), so the text is
a function of seed, prompt and target alone. Greedy decoding is the case without noise."""

from __future__ import annotations

from torch import Tensor

from flashspec.core import Draft, Verdict
from flashspec.kernels import philox_gumbel
from flashspec.sampling.noise import Purpose
from flashspec.sampling.rejection import leading


def verify_greedy(logits: Tensor, draft: Draft) -> Verdict:
    """logits: (B, γ + 1, V). Accept while the draft is what the target would write."""
    return _verify_tokens(logits.argmax(-1), draft)


def verify_coupled(weights: Tensor, draft: Draft, seeds: Tensor, positions: Tensor) -> Verdict:
    """weights: (B, γ + 1, V) log-weights of the target, deciding text positions (B, γ + 1). seeds: (B,) int64."""
    noise = philox_gumbel(seeds, positions, Purpose.TOKEN, weights.shape[-1])
    return _verify_tokens((weights + noise).argmax(-1), draft)


def _verify_tokens(token_ids: Tensor, draft: Draft) -> Verdict:
    num_accepted = leading(token_ids[:, :-1] == draft.token_ids, draft.lengths)
    next_token = token_ids.gather(1, num_accepted[:, None])[:, 0]
    return Verdict(num_accepted, next_token)
