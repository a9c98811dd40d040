"""One step of speculative decoding: draft, verify, commit. Pure in the state's tensors; nothing is read back."""

from __future__ import annotations

from flashspec.core import Draft
from flashspec.drafters.base import Proposer
from flashspec.engine.outcome import Outcome
from flashspec.engine.state import DecodeState


def step(state: DecodeState, proposer: Proposer, length: int) -> Outcome:
    """Draft at most `length` tokens a row, score them in one target forward, keep what the exact test keeps."""
    return verify(state, proposer.propose(state, length))  # token_ids (B, γ)


def verify(state: DecodeState, draft: Draft) -> Outcome:
    """The part of a step that follows a draft, whoever wrote it."""
    draft = draft.to(state.tokens.device)
    logits = state.score(draft)  # (B, γ + 1, V)
    likelihoods = state.likelihoods(logits)  # None unless log-probabilities are asked for
    verdict, failed = state.sampler.verify(logits, draft, state.lengths, likelihoods)  # num_accepted, next_token (B,)
    return state.commit(draft, verdict, failed, likelihoods)
