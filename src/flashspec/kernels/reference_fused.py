"""PyTorch twin of the fused verification; `flashspec.kernels.verify_logits` holds the contract."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashspec.core import Draft, FinishReason, Likelihoods
from flashspec.kernels.reference import philox_gumbel, philox_uniform, verify_tokens

ACCEPT, RECOVER, TOKEN = 1, 2, 3  # what a draw is for: sampling.noise.Purpose
COLDEST = 1e-6
HEAD = 5  # columns of a commit ahead of its tokens
NEVER = float("-inf")


def verify_logits(
    target_logits: Tensor,
    draft_token_ids: Tensor,
    draft_lengths: Tensor,
    draft_weights: Tensor | None,
    seeds: Tensor,
    lengths: Tensor,
    temperature: Tensor,
    variant: str,
    floors: Tensor | None = None,
    epsilon: float = 0.0,
    delta: float = 0.0,
    gumbel: Callable[[Tensor, Tensor, int, int], Tensor] = philox_gumbel,
) -> tuple[Tensor, Tensor, Tensor]:
    logits = target_logits.float()
    gamma, vocab_size = draft_token_ids.shape[1], logits.shape[2]
    offsets = torch.arange(gamma + 1, device=logits.device)
    positions = lengths[:, None] + offsets  # (B, γ + 1)
    finite = logits.amax(-1).isfinite()  # (B, γ + 1)
    if floors is not None:
        logits = logits.masked_fill(logits < floors[..., None], NEVER)
    greedy = (temperature == 0)[:, None] | (variant == "greedy")  # (B, 1)
    weights = logits / temperature.clamp(min=COLDEST)[:, None, None]
    best = logits.argmax(-1)  # (B, γ + 1)
    if variant == "coupled":
        noise = gumbel(seeds, positions, TOKEN, vocab_size)
        best = torch.where(greedy, best, (weights + noise).argmax(-1))
    passed = best[:, :gamma] == draft_token_ids
    if variant == "rejection":
        uniform = philox_uniform(seeds, positions[:, :gamma], ACCEPT)
        passed = torch.where(greedy, passed, _test(weights, draft_token_ids, draft_weights, uniform))
    if variant == "typical":
        passed = torch.where(greedy, passed, _typical(weights, draft_token_ids, epsilon, delta))
    passed = passed & finite[:, :gamma] & (offsets[:gamma] < draft_lengths[:, None])
    num_accepted = passed.long().cumprod(1).sum(1)
    chosen = num_accepted[:, None]  # (B, 1)
    next_token = best.gather(1, chosen)[:, 0]
    if variant in ("rejection", "typical"):
        noise = gumbel(seeds, positions.gather(1, chosen), RECOVER, vocab_size)[:, 0]
        draft_lengths = draft_lengths if variant == "rejection" else torch.zeros_like(draft_lengths)  # no residual
        residual = _residual(weights, draft_token_ids, draft_lengths, draft_weights, num_accepted)
        next_token = torch.where(greedy[:, 0], next_token, (residual.log() + noise).argmax(-1))
    failed = ((offsets <= chosen) & ~finite).any(1)
    return num_accepted, next_token, failed


def weigh(likelihoods: Likelihoods, draft_token_ids: Tensor, num_accepted: Tensor, next_token: Tensor) -> None:
    logits, last = likelihoods.logits, num_accepted[:, None]  # (B, γ + 1, V), (B, 1)
    kept = torch.cat([draft_token_ids, next_token[:, None]], 1).scatter(1, last, next_token[:, None])
    index = kept.clamp(0, logits.shape[2] - 1)[..., None]  # a draft's tokens behind the kept ones may be any
    totals = logits.float().logsumexp(-1)
    likelihoods.totals.copy_(totals.masked_fill(totals == -NEVER, float("nan")))
    likelihoods.tokens.copy_(logits.gather(2, index)[..., 0].float() - likelihoods.totals)


def _test(weights: Tensor, token_ids: Tensor, draft_weights: Tensor | None, uniform: Tensor) -> Tensor:
    target = weights[:, :-1].log_softmax(-1)
    draft = torch.zeros_like(target) if draft_weights is None else draft_weights.float().log_softmax(-1)
    return verify_tokens(draft, target, uniform, token_ids)[0]


def _typical(weights: Tensor, token_ids: Tensor, epsilon: float, delta: float) -> Tensor:
    """(B, γ) bool: p(x) > min(epsilon, delta * exp(-entropy(p)))."""
    target = weights[:, :-1].log_softmax(-1)
    probs = target.exp()
    entropy = -torch.where(probs > 0, probs * target, 0.0).sum(-1)
    known = (token_ids >= 0) & (token_ids < weights.shape[2])
    likely = probs.gather(-1, torch.where(known, token_ids, 0)[..., None])[..., 0]
    return known & (likely > torch.clamp(delta * torch.exp(-entropy), max=epsilon))


def _residual(
    weights: Tensor, token_ids: Tensor, draft_lengths: Tensor, draft_weights: Tensor | None, num_accepted: Tensor
) -> Tensor:
    """(B, V) probabilities up to a factor: max(0, p - q) after a rejection, p where that is empty or nothing failed."""
    rows = torch.arange(weights.shape[0], device=weights.device)
    target_probs = weights[rows, num_accepted].softmax(-1)  # (B, V)
    if token_ids.shape[1] == 0:
        return target_probs
    index = num_accepted.clamp(max=token_ids.shape[1] - 1)
    if draft_weights is None:
        draft_probs = torch.arange(weights.shape[2], device=weights.device) == token_ids[rows, index][:, None]
    else:
        draft_probs = draft_weights[rows, index].float().softmax(-1)
    excess = torch.where(target_probs > draft_probs, target_probs - draft_probs.float(), 0.0)  # NaN drafts: p
    keeps = (num_accepted >= draft_lengths)[:, None] | (excess.sum(-1, keepdim=True) == 0)
    return torch.where(keeps, target_probs, excess)


def cut_floors(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    max_top_k: int | None = None,
) -> Tensor:
    logits = logits.float()
    weights = logits / temperature.clamp(min=COLDEST)[:, None, None]  # (B, Q, V)
    if top_k is not None:
        ranked = weights.topk(logits.shape[2] if max_top_k is None else max_top_k).values
        kth = ranked.gather(-1, (top_k - 1).clamp(min=0)[:, None, None].expand(*weights.shape[:2], 1))
        weights = weights.masked_fill((weights < kth) & (top_k > 0)[:, None, None], NEVER)
    if top_p is not None:
        weights = keep_nucleus(weights, top_p[:, None, None])
    if min_p is not None:
        least = weights.amax(-1, keepdim=True) + min_p.log()[:, None, None]
        weights = weights.masked_fill(weights < least, NEVER)
    floors = torch.where(weights == NEVER, -NEVER, logits).amin(-1)  # (B, Q), the smallest logit that is kept
    return torch.where(logits.amax(-1).isfinite(), floors, NEVER)


def keep_nucleus(weights: Tensor, top_p: Tensor) -> Tensor:
    """Mask all but the smallest set of most likely tokens that holds at least top_p (broadcastable) of the mass.

    The edge is found by halving the interval of probabilities, so nothing is sorted: a sort of 49,152 floats costs
    3 ms on a CPU core, 24 halvings 0.4 ms.
    """
    probs = weights.softmax(-1)
    high = probs.amax(-1, keepdim=True)
    low = torch.zeros_like(high)
    enough = torch.minimum(top_p, probs.sum(-1, keepdim=True))
    for _ in range(24):
        middle = (low + high) / 2
        holds = torch.where(probs >= middle, probs, 0.0).sum(-1, keepdim=True) >= enough
        low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
    return torch.where((probs >= low) | (top_p >= 1), weights, NEVER)


def choose_tokens(
    logits: Tensor,
    draft: Draft,
    offset: int,
    seeds: Tensor,
    lengths: Tensor,
    temperature: Tensor,
    purpose: int | None,
    part: Tensor | None = None,
    bias: Tensor | None = None,
    floors: Tensor | None = None,
    least: int = 1,
) -> None:
    assert draft.faulty is not None
    logits = logits.float() if bias is None else logits.float() + bias
    finite = logits.amax(-1).isfinite()
    if floors is not None:
        logits = logits.masked_fill(logits < floors[:, None], NEVER)
    tempered = logits / temperature.clamp(min=COLDEST)[:, None]
    if draft.logits is not None:
        draft.logits[:, offset] = tempered
    scores = logits
    if purpose is not None:
        noise = philox_gumbel(seeds, lengths[:, None] + offset, purpose, logits.shape[1])[:, 0]
        scores = torch.where((temperature == 0)[:, None], logits, tempered + noise)
    chosen = scores.argmax(-1)
    draft.token_ids[:, offset] = chosen if part is None else part[chosen]
    goes_on = draft.lengths == offset if offset else lengths >= least
    if offset == 0:
        draft.lengths.zero_()
        draft.faulty.zero_()
    draft.lengths += goes_on & finite
    draft.faulty |= goes_on & ~finite


def look_up(
    tokens: Tensor, lengths: Tensor, bound: int, length: int, max_ngram: int, min_ngram: int
) -> tuple[Tensor, Tensor]:
    text = tokens[:, :bound]  # (B, S)
    ends = torch.arange(bound, device=tokens.device)  # where a match may end
    matched = ends < lengths[:, None] - 1  # (B, S)
    matched_length = torch.zeros_like(text)
    for back in range(max_ngram):
        last = tokens.gather(1, (lengths[:, None] - 1 - back).clamp(min=0))  # (B, 1)
        matched = matched & (text.roll(back, 1) == last) & (ends >= back)
        matched_length += matched
    best_length, best_end = (matched_length * bound + ends).max(1)
    start = best_end[:, None] + 1  # (B, 1), the continuation's first token
    period = (lengths[:, None] - start).clamp(min=1)
    offsets = torch.arange(length, device=tokens.device) % period  # (B, length)
    token_ids = tokens.gather(1, (start + offsets).clamp(max=tokens.shape[1] - 1))
    return token_ids, (best_length >= min_ngram * bound) * length


def commit(
    token_ids: Tensor,
    draft_lengths: Tensor,
    num_accepted: Tensor,
    next_token: Tensor,
    failed: Tensor,
    faulty: Tensor | None,
    tokens: Tensor,
    lengths: Tensor,
    limits: Tensor,
    finish: Tensor,
    stop_ids: Tensor,
    cached: Tensor,
) -> Tensor:
    gamma = token_ids.shape[1]
    index = torch.arange(gamma + 1, device=tokens.device)
    emitted = torch.cat([token_ids, next_token[:, None]], 1)  # (B, γ + 1)
    emitted = emitted.scatter(1, num_accepted[:, None], next_token[:, None])
    running = finish == FinishReason.RUNNING
    num_emitted = torch.minimum(num_accepted + (~failed).long(), limits - lengths)
    stops = (emitted[..., None] == stop_ids[:, None]).any(-1) & (index < num_emitted[:, None])  # (B, γ + 1)
    before_stop = (stops.long().cumsum(1) == 0).sum(1)  # tokens ahead of the first stop token
    num_emitted = torch.minimum(num_emitted, before_stop + 1) * running
    grown = lengths + num_emitted
    ended = torch.where(grown >= limits, FinishReason.LENGTH.value, failed * FinishReason.ERROR.value)
    ended = torch.where(before_stop <= gamma, FinishReason.STOP.value, ended)
    ended = torch.where(running, ended, finish)
    drafted = torch.where(ended > 0, torch.minimum(draft_lengths, num_emitted), draft_lengths)
    faults = torch.zeros_like(finish) if faulty is None else (faulty & running).long()
    tokens.scatter_(1, lengths[:, None] + index, emitted)
    lengths.copy_(grown)
    finish.copy_(ended)
    torch.minimum(cached, grown - 1, out=cached)
    head = torch.stack([drafted, torch.minimum(num_accepted, num_emitted), num_emitted, ended, faults], 1)
    return torch.cat([head, emitted], 1)
