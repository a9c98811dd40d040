"""PyTorch twins of the Triton kernels; `flashspec.kernels` checks the arguments and holds the contracts.

No twin reads anything back to the host, so all of them run under fake tensors and in CUDA graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF


def verify_tokens(
    draft_logprobs: Tensor, target_logprobs: Tensor, u: Tensor, draft_token_ids: Tensor
) -> tuple[Tensor, Tensor]:
    in_vocab = (draft_token_ids >= 0) & (draft_token_ids < draft_logprobs.shape[2])  # (B, γ)
    index = torch.where(in_vocab, draft_token_ids, 0).unsqueeze(2)  # (B, γ, 1)
    draft = draft_logprobs.gather(2, index).squeeze(2).float()  # (B, γ)
    target = target_logprobs.gather(2, index).squeeze(2).float()  # (B, γ)
    # Float32 logarithms differ in the last bit between devices; one rounded from float64 does not.
    log_u = u.double().log().float()
    passed = in_vocab & (log_u < 0) & (log_u < target - draft)  # NaN compares false: rejected
    return passed, passed.cumprod(1).sum(1, dtype=torch.int32)


def gather_accepted(token_ids: Tensor, first_rejection: Tensor) -> Tensor:
    offsets = torch.arange(token_ids.shape[1], device=token_ids.device)
    return torch.where(offsets < first_rejection.unsqueeze(1), token_ids, -1)


def philox4x32(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox on four counter and two key words: int64 tensors in [0, 2^32) that broadcast.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps around: all 64 bits are right
        # c1, c3 and the keys grow past 32 bits; one mask takes that away together with the shift's sign.
        c0, c1 = ((product1 >> 32) ^ c1 ^ k0) & MASK32, product1
        c2, c3 = ((product0 >> 32) ^ c3 ^ k1) & MASK32, product0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1 & MASK32, c2, c3 & MASK32


def _random_words(
    seeds: Tensor, positions: Tensor, purpose: int, n_groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words for every group of four tokens, each (B, Q, n_groups) int64 in [0, 2^32)."""
    groups = torch.arange(n_groups, device=seeds.device)
    position = positions.unsqueeze(2)  # (B, Q, 1)
    seed = seeds.view(-1, 1, 1)
    low, high = position & MASK32, (position >> 32) & MASK32
    return philox4x32(groups, low, torch.full_like(low, purpose), high, seed & MASK32, (seed >> 32) & MASK32)


def philox_uniform(seeds: Tensor, positions: Tensor, purpose: int) -> Tensor:
    if positions.numel() == 0:  # a step without a draft: some 120 operations on nothing took 0.4 ms
        return positions.float()
    word = _random_words(seeds, positions, purpose, 1)[0].squeeze(2)  # (B, Q)
    return ((word >> 8) | 1).float() * 2.0**-24


def philox_gumbel(seeds: Tensor, positions: Tensor, purpose: int, vocab_size: int) -> Tensor:
    n_groups = (vocab_size + 3) // 4
    words = _random_words(seeds, positions, purpose, n_groups)
    noise = torch.empty(*positions.shape, n_groups, 4, dtype=torch.float32, device=seeds.device)
    for lane, word in enumerate(words):
        noise[..., lane] = word
    noise.mul_(-(2.0**-32)).clamp_(2.0**-24 - 1, -(2.0**-33))
    noise.log1p_().neg_().log_().neg_()
    return noise.flatten(2)[:, :, :vocab_size].contiguous()


def window(
    tokens: Tensor, lengths: Tensor, draft_token_ids: Tensor, capacity: int, cached: Tensor
) -> tuple[Tensor, Tensor]:
    last = tokens.gather(1, lengths[:, None] - 1)  # (B, 1)
    offsets = torch.arange(draft_token_ids.shape[1] + 1, device=tokens.device)
    positions = (lengths[:, None] - 1 + offsets).clamp(max=capacity - 1)
    torch.add(positions[:, -1], 1, out=cached)
    return torch.cat([last, draft_token_ids], 1), positions
