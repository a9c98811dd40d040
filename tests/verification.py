"""Verifications of drawn shapes, and the kernel held to its twin.

What is drawn follows from FLASHSPEC_SEED in the environment, else it is new every run; a failing test prints it.
"""

from __future__ import annotations

import os
import random
from typing import Any

import torch
from torch import Tensor

from flashspec import kernels
from flashspec.core import Likelihoods
from flashspec.kernels import reference_fused as twins

SEED = int(os.environ.get("FLASHSPEC_SEED") or random.SystemRandom().randrange(2**31))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EDGES = (1, 2, 3, 5, 1023, 1024, 1025, 4095, 4096, 4097, 8193, 32_000, 128_256, 151_936)
THRESHOLDS = {"epsilon": 0.09, "delta": 0.3}


def drawn(case: int, device: str, most: int, places: int) -> dict[str, Any]:
    """Arguments of `verify_logits` but its variant, of at most `most` logits in so many places, B (γ + 1)."""
    print(f"FLASHSPEC_SEED={SEED}")
    dice = random.Random(SEED + case)
    edges = [edge for edge in EDGES if edge <= most]
    vocab_size = dice.choice(edges) if dice.random() < 0.4 else int(edges[-1] ** dice.random())
    places = max(1, min(places, most // vocab_size))
    positions = dice.randint(1, min(17, places))
    rows = dice.randint(1, places // positions)
    gamma, generator = positions - 1, torch.Generator(device).manual_seed(dice.randrange(2**40))
    print(f"B = {rows}, gamma = {gamma}, V = {vocab_size}")

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    target = 2.5 * normal(rows, positions, vocab_size)
    draft = target[:, :gamma] + 0.5 * normal(rows, gamma, vocab_size)
    race = draft.softmax(-1) / torch.empty_like(draft).exponential_(generator=generator)
    one_hot = dice.random() < 0.5
    whole = torch.randint(2**40, (3, rows), device=device, generator=generator)
    target = spread(target.to(dice.choice(DTYPES)), dice)
    heat = torch.tensor([1.0, 0.7, 0.0, 1.3], device=device)[whole[0] % 4]
    limits = torch.full((rows,), min(20, vocab_size), device=device), torch.full((rows,), 0.95, device=device)
    cut = dice.random() < 0.5
    shifted = dice.random() < 0.5  # as penalties do: log-probabilities are of other logits than the verdict
    raw = spread((target.float() + normal(rows, positions, vocab_size)).to(dice.choice(DTYPES)), dice)
    return {
        "target_logits": target,
        "draft_token_ids": (target[:, :gamma] if one_hot else race).argmax(-1),
        "draft_lengths": torch.where(whole[1] % 3 == 0, whole[0] % positions, gamma),
        "draft_weights": None if one_hot else spread(draft.to(dice.choice(DTYPES)), dice),
        "seeds": whole[1],
        "lengths": whole[2],
        "temperature": heat,
        "floors": twins.cut_floors(target, heat, *limits) if cut else None,
        "likelihoods": Likelihoods.of(raw if shifted else target),
    }


def spread(logits: Tensor, dice: random.Random) -> Tensor:
    """The same values, laid out in memory in one of the ways that callers do."""
    size, way = logits.shape[2], dice.randrange(4)
    if way == 1:  # a wider row, as a padded vocabulary has
        return torch.cat([logits, torch.full_like(logits[..., :1], float("nan")).expand(-1, -1, 5)], -1)[..., :size]
    if way == 2:
        return logits.transpose(0, 1).contiguous().transpose(0, 1)
    if way == 3:
        return torch.stack([logits, logits], -1)[..., 0]
    return logits


def assert_equals_twin(arguments: dict[str, Any], variant: str) -> tuple[Tensor, Tensor, Tensor]:
    """Verdict and log-probabilities of the door against PyTorch's; returns the verdict."""
    likelihoods: Likelihoods = arguments["likelihoods"]
    found = kernels.verify_logits(**arguments, variant=variant, **THRESHOLDS)
    plain = {name: value for name, value in arguments.items() if name != "likelihoods"}
    num_accepted, next_token, failed = twins.verify_logits(**plain, variant=variant, **THRESHOLDS)
    assert torch.equal(found[2], failed) and torch.equal(found[0], num_accepted)
    assert torch.equal(found[1][~failed], next_token[~failed])
    logprobs = likelihoods.logits.double().log_softmax(-1)
    index = torch.cat([arguments["draft_token_ids"], found[1][:, None]], 1)
    index = index.scatter(1, num_accepted[:, None], found[1][:, None]).clamp(0, logprobs.shape[2] - 1)
    offsets = torch.arange(index.shape[1], device=index.device)
    written = offsets <= num_accepted[:, None]
    wanted = logprobs.gather(2, index[..., None])[..., 0].float()
    close = {"rtol": 1e-6, "atol": 5e-6, "equal_nan": True}
    torch.testing.assert_close(likelihoods.tokens[written], wanted[written], **close)
    totals = likelihoods.logits.double().logsumexp(-1).float()
    known = written & wanted.isfinite()
    torch.testing.assert_close(likelihoods.totals[known], totals[known], **close)
    return found
