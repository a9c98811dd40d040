"""The door to the kernels of a step (`decoding` is the one to a decoder's): Triton on a GPU that it suits, C++ on a CPU
with a compiler, PyTorch twins elsewhere; callers never ask which one runs.

B rows, γ draft tokens (0 is allowed), Q positions, V vocabulary entries. Every function raises ValueError,
naming the argument, for a shape, dtype or device that does not fit. Nothing is read back from a GPU.
`TRITON_INTERPRET=1`, set before triton is imported, runs the Triton kernels on CPU tensors.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from flashspec.core import Draft, Likelihoods
from flashspec.kernels import native_build, native_choose, native_step, native_verify, reference, reference_fused
from flashspec.kernels.checks import check, check_counter, check_ids_on_cpu, check_written
from flashspec.kernels.device import TRITON_AVAILABLE, usable

__all__ = [
    "TRITON_AVAILABLE",
    "choose_tokens",
    "commit",
    "cut_floors",
    "gather_accepted",
    "look_up",
    "philox_gumbel",
    "philox_uniform",
    "verify_logits",
    "verify_tokens",
    "window",
]

_LOGPROB_DTYPES = (torch.float32, torch.bfloat16)
_INDEX_DTYPES = (torch.int32, torch.int64)
_LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_VARIANTS = ("rejection", "coupled", "typical", "greedy")


def verify_tokens(
    draft_logprobs: Tensor, target_logprobs: Tensor, u: Tensor, draft_token_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """The acceptance test `log u < min(0, log p(x) - log q(x))`, in float32.

    draft_logprobs (log q), target_logprobs (log p): (B, γ, V) float32 or bfloat16, any strides.
    u: (B, γ) float32 uniforms. draft_token_ids (x): (B, γ) int64.
    Returns accepted (B, γ) bool, the outcome of every position's own test, also behind a failed one; and
    first_rejection (B,) int32, the number of tokens that are kept, γ where nothing failed.
    NaN and p(x) = 0 fail, q(x) = 0 < p(x) passes, u = 0 passes where p(x) > 0, u = 1 fails.
    An id outside [0, V) raises ValueError on a CPU, fails on a GPU.
    """
    shape = tuple(draft_logprobs.shape)
    if len(shape) != 3 or shape[2] < 1:
        raise ValueError(f"draft_logprobs should be (B, γ, V) with V >= 1: got shape {shape}")
    device = draft_logprobs.device
    check("draft_logprobs", draft_logprobs, shape, _LOGPROB_DTYPES, device)
    check("target_logprobs", target_logprobs, shape, _LOGPROB_DTYPES, device)
    check("u", u, shape[:2], (torch.float32,), device)
    check("draft_token_ids", draft_token_ids, shape[:2], (torch.int64,), device)
    check_ids_on_cpu(draft_token_ids, draft_logprobs)
    if _use_triton(device):
        from flashspec.kernels import verify

        return verify.verify_tokens(draft_logprobs, target_logprobs, u, draft_token_ids)
    return reference.verify_tokens(draft_logprobs, target_logprobs, u, draft_token_ids)


def gather_accepted(token_ids: Tensor, first_rejection: Tensor) -> Tensor:
    """token_ids (B, γ) int64, first_rejection (B,) int32 or int64 -> (B, γ) int64: row b's first
    first_rejection[b] tokens, -1 after them."""
    if token_ids.dim() != 2:
        raise ValueError(f"token_ids should be (B, γ): got shape {tuple(token_ids.shape)}")
    check("token_ids", token_ids, tuple(token_ids.shape), (torch.int64,), token_ids.device)
    check("first_rejection", first_rejection, token_ids.shape[:1], _INDEX_DTYPES, token_ids.device)
    if _use_triton(token_ids.device):
        from flashspec.kernels import gather

        return gather.gather_accepted(token_ids, first_rejection)
    return reference.gather_accepted(token_ids, first_rejection)


def philox_uniform(seeds: Tensor, positions: Tensor, purpose: int) -> Tensor:
    """seeds (B,) int64, positions (B, Q) int64, purpose in [0, 2^32) -> (B, Q) float32 uniforms.

    A function of (seed, position, purpose): an odd multiple of 2^-24, so 0 < u < 1. Kernel and twin give the
    same bits. It shares its hash with token 0 of `philox_gumbel`, so the two need different purposes.
    """
    check_counter(seeds, positions, purpose)
    if _use_triton(positions.device):
        from flashspec.kernels import noise

        return noise.philox_uniform(seeds, positions, purpose)
    return reference.philox_uniform(seeds, positions, purpose)


def philox_gumbel(seeds: Tensor, positions: Tensor, purpose: int, vocab_size: int) -> Tensor:
    """seeds (B,) int64, positions (B, Q) int64, purpose in [0, 2^32) -> (B, Q, V) float32 Gumbel noise.

    A function of (seed, position, purpose, token), whatever the vocabulary's size. g = -log(-log(1 - u)) with
    u a multiple of 2^-32: log1p keeps apart the small u that make the large g, so g ends at 22.9, not at the
    16.6 of a float32 uniform near 1. Kernel and twin share u; their g differ by rounding only.
    """
    check_counter(seeds, positions, purpose)
    if vocab_size < 1:
        raise ValueError(f"vocab_size should be at least 1: got {vocab_size}")
    if _use_triton(positions.device):
        from flashspec.kernels import noise

        return noise.philox_gumbel(seeds, positions, purpose, vocab_size)
    if _use_native(seeds, positions):
        return native_verify.philox_gumbel(seeds, positions, purpose, vocab_size)
    return reference.philox_gumbel(seeds, positions, purpose, vocab_size)


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
    likelihoods: Likelihoods | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A whole verification from raw logits, log-probabilities included, in two launches; floors are one more.

    target_logits: (B, γ + 1, V) float32, bfloat16 or float16; position i decides text position lengths + i.
    draft_token_ids: (B, γ) int64, of which row b proposes the first draft_lengths[b], (B,) int64.
    draft_weights: (B, γ, V) float32, bfloat16 or float16 log-weights that the tokens were drawn from; None: one-hot,
    and so it counts unless variant is 'rejection'. seeds, lengths: (B,) int64. temperature: (B,) float32, divides the
    target's logits; rows at 0 are greedy. For penalties pass shifted logits. floors: (B, γ + 1) float32 target logits
    under which a token is out, of `cut_floors`; None: none is.
    variant: 'rejection' (Leviathan, Kalman and Matias 2023, Algorithm 1: the next token is drawn from max(0, p - q)
    after a rejection, from p after a whole draft); 'coupled' (Daliri, Musco and Suresh 2024: accept while the draft is
    what the target draws with the noise that the drafter used, so the text depends on no draft); 'greedy', which is the
    latter without noise and reads no temperature; 'typical' (Cai et al. 2024, Medusa; lossy), which keeps a draft token
    x while p(x) > min(epsilon, delta * exp(-entropy(p))) and draws the next one from p.
    likelihoods: None, or of logits (B, γ + 1, V), whatever target_logits were shifted by; written up to and with the
    next token, what lies behind it means nothing.
    Returns num_accepted (B,) int64, next_token (B,) int64 in [0, V), and failed (B,) bool: rows whose next_token
    means nothing, since the position behind the accepted tokens holds NaN or +inf, or nothing but -inf. A draft token
    outside [0, V) is rejected; so is one whose weights are not finite, and the next token is then drawn from the target
    alone.
    """
    shape = tuple(target_logits.shape)
    if len(shape) != 3 or shape[1] < 1 or shape[2] < 1:
        raise ValueError(f"target_logits should be (B, γ + 1, V) with V >= 1: got shape {shape}")
    if variant not in _VARIANTS:
        raise ValueError(f"variant should be one of {', '.join(_VARIANTS)}: got {variant!r}")
    batch_size, gamma, device = shape[0], shape[1] - 1, target_logits.device
    check("target_logits", target_logits, shape, _LOGIT_DTYPES, device)
    check("draft_token_ids", draft_token_ids, (batch_size, gamma), (torch.int64,), device)
    if draft_weights is not None:
        check("draft_weights", draft_weights, (batch_size, gamma, shape[2]), _LOGIT_DTYPES, device)
    for name, rows in (("draft_lengths", draft_lengths), ("seeds", seeds), ("lengths", lengths)):
        check(name, rows, (batch_size,), (torch.int64,), device)
    check("temperature", temperature, (batch_size,), (torch.float32,), device)
    if floors is not None:
        check("floors", floors, (batch_size, gamma + 1), (torch.float32,), device)
    if likelihoods is not None:
        check("likelihoods.logits", likelihoods.logits, shape, _LOGIT_DTYPES, device)
        for name, written in (("tokens", likelihoods.tokens), ("totals", likelihoods.totals)):
            check(f"likelihoods.{name}", written, shape[:2], (torch.float32,), device)
            check_written(f"likelihoods.{name}", written)
    tensors = target_logits, draft_token_ids, draft_lengths, draft_weights, seeds, lengths, temperature
    if _use_triton(device):
        from flashspec.kernels import fused

        return fused.verify_logits(*tensors, variant, floors, epsilon, delta, likelihoods)
    native = _use_native(*(tensor for tensor in (*tensors, floors) if tensor is not None))
    if native and variant != "typical":
        verdict = native_verify.verify_logits(*tensors, variant, floors)
    else:
        gumbel = native_verify.philox_gumbel if native else reference.philox_gumbel
        verdict = reference_fused.verify_logits(*tensors, variant, floors, epsilon, delta, gumbel)
    if likelihoods is not None:
        reference_fused.weigh(likelihoods, draft_token_ids, *verdict[:2])
    return verdict


def cut_floors(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    max_top_k: int | None = None,
) -> Tensor:
    """Where top-k, then top-p, then min-p cut: (B, Q) float32, the logits under which a token is out, or -inf.

    logits: (B, Q, V) float32, bfloat16 or float16. temperature: (B,) float32. top_k: (B,) int64, 0 is off. top_p: (B,)
    float32, 1 is off: the smallest set of most likely tokens that holds at least so much of the mass stays. min_p: (B,)
    float32, 0 is off: what is less likely than so much of the most likely token goes. None: off in every row.
    max_top_k: host integer, at least every top_k, that saves a CPU a sort.
    Tokens as likely as the last that stays, stay. One launch.
    """
    if logits.dim() != 3 or logits.shape[2] < 1:
        raise ValueError(f"logits should be (B, Q, V) with V >= 1: got shape {tuple(logits.shape)}")
    check("logits", logits, tuple(logits.shape), _LOGIT_DTYPES, logits.device)
    for name, rows, dtype in (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int64),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
    ):
        if rows is not None:
            check(name, rows, logits.shape[:1], (dtype,), logits.device)
    if _use_triton(logits.device):
        from flashspec.kernels import cut

        return cut.cut_floors(logits, temperature, top_k, top_p, min_p)
    return reference_fused.cut_floors(logits, temperature, top_k, top_p, min_p, max_top_k)


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
    """Draw token `offset` of every row's draft: the argmax of (logits + bias) / temperature + `philox_gumbel` noise of
    text position lengths + offset, in two launches.

    logits: (B, V) float32, bfloat16 or float16. draft: written. Its token_ids[:, offset] get the tokens, its logits[:,
    offset], if it has any, what they are drawn from; its lengths count them, from 0 at offset 0. A row's draft ends
    before its first logits that hold NaN or +inf, or nothing but -inf, and is faulty then; tokens behind mean nothing.
    seeds, lengths: (B,) int64. temperature: (B,) float32, rows at 0 take the argmax without noise. purpose: None where
    all rows do. part: (V,) int64, the tokens that logits are of; None: all. bias: (B, V) float32. floors: (B,) float32,
    biased logits under which a token is out. least: rows of shorter texts propose nothing.
    """
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits should be (B, V) with V >= 1: got shape {tuple(logits.shape)}")
    (rows, size), gamma, device = logits.shape, draft.token_ids.shape[-1], logits.device
    if draft.faulty is None or not 0 <= offset < gamma:
        raise ValueError(f"draft of {gamma} tokens should have faulty (B,), and a place for token {offset}")
    check("logits", logits, (rows, size), _LOGIT_DTYPES, device)
    for name, tensor, shape, dtype in (
        ("draft.token_ids", draft.token_ids, (rows, gamma), torch.int64),
        ("draft.lengths", draft.lengths, (rows,), torch.int64),
        ("draft.faulty", draft.faulty, (rows,), torch.bool),
        ("draft.logits", draft.logits, (rows, gamma, size), torch.float32),
        ("seeds", seeds, (rows,), torch.int64),
        ("lengths", lengths, (rows,), torch.int64),
        ("temperature", temperature, (rows,), torch.float32),
        ("part", part, (size,), torch.int64),
        ("bias", bias, (rows, size), torch.float32),
        ("floors", floors, (rows,), torch.float32),
    ):
        if tensor is not None:
            check(name, tensor, shape, (dtype,), device)
            if name.startswith("draft"):
                check_written(name, tensor)
    run = reference_fused.choose_tokens
    if _use_triton(device):
        from flashspec.kernels.choose import choose_tokens as run
    elif _use_native(logits, seeds):
        run = native_choose.choose_tokens
    run(logits, draft, offset, seeds, lengths, temperature, purpose, part, bias, floors, least)


def look_up(
    tokens: Tensor, lengths: Tensor, bound: int, length: int, max_ngram: int, min_ngram: int
) -> tuple[Tensor, Tensor]:
    """What followed the last occurrence of a text's last tokens, in one launch.

    tokens: (B, T) int64, rows side by side; lengths: (B,) int64, what of them is text, at least 1; bound: host integer,
    at least every length, which a GPU does not need. Matches of the last min_ngram..max_ngram tokens count, the longest
    wins, then the latest. One so near the end that its continuation runs out of text repeats the stretch between.
    Returns token_ids (B, length) int64, garbage from the text's ids where nothing is found, and draft_lengths (B,)
    int64, `length` or 0.
    """
    if tokens.dim() != 2 or tokens.stride(1) != 1:
        raise ValueError(f"tokens should be (B, T), a row's tokens side by side: got shape {tuple(tokens.shape)}")
    check("tokens", tokens, tuple(tokens.shape), (torch.int64,), tokens.device)
    check("lengths", lengths, tuple(tokens.shape[:1]), (torch.int64,), tokens.device)
    if not (1 <= min_ngram <= max_ngram and length >= 1):
        raise ValueError(
            f"length and min_ngram <= max_ngram should be at least 1: got {length}, {min_ngram}, {max_ngram}"
        )
    if _use_triton(tokens.device):
        from flashspec.kernels import lookup

        return lookup.look_up(tokens, lengths, bound, length, max_ngram, min_ngram)
    return reference_fused.look_up(tokens, lengths, bound, length, max_ngram, min_ngram)


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
    """Append what a verdict keeps to the text, up to a stop token or a row's limit, in one launch.

    token_ids: (B, γ) int64, draft_lengths: (B,) int64, faulty: (B,) bool or None: a Draft. num_accepted, next_token:
    (B,) int64, failed: (B,) bool, rows that end behind the accepted tokens: a verdict. tokens: (B, T) int64 with T >=
    lengths + γ + 1, lengths, finish (a FinishReason): (B,) int64, all three written. limits: (B,) int64, at which rows
    end.
    stop_ids: (B, K) int64, padded with -1. cached: (R, B) int64, written: at most lengths - 1 afterwards.
    Returns (B, 5 + γ + 1) int64: drafted, accepted, emitted, finish, faulty, then tokens, of which `emitted` count.
    """
    (batch_size, gamma), device = token_ids.shape, token_ids.device
    check("token_ids", token_ids, (batch_size, gamma), (torch.int64,), device)
    check("tokens", tokens, (batch_size, tokens.shape[-1]), (torch.int64,), device)
    check("stop_ids", stop_ids, (batch_size, stop_ids.shape[-1]), (torch.int64,), device)
    check("cached", cached, (cached.shape[0], batch_size), (torch.int64,), device)
    for name, rows in (
        ("draft_lengths", draft_lengths),
        ("num_accepted", num_accepted),
        ("next_token", next_token),
        ("lengths", lengths),
        ("limits", limits),
        ("finish", finish),
    ):
        check(name, rows, (batch_size,), (torch.int64,), device)
    for name, flags in (("failed", failed), ("faulty", faulty)):
        if flags is not None:
            check(name, flags, (batch_size,), (torch.bool,), device)
    for name, written in (("tokens", tokens[:1]), ("lengths", lengths), ("finish", finish), ("cached", cached)):
        check_written(name, written)
    arguments = (token_ids, draft_lengths, num_accepted, next_token, failed, faulty)
    if _use_triton(device):
        from flashspec.kernels import append

        return append.commit(*arguments, tokens, lengths, limits, finish, stop_ids, cached)
    if _use_native(tokens, token_ids):
        return native_step.commit(*arguments, tokens, lengths, limits, finish, stop_ids, cached)
    return reference_fused.commit(*arguments, tokens, lengths, limits, finish, stop_ids, cached)


def window(
    tokens: Tensor, lengths: Tensor, draft_token_ids: Tensor, capacity: int, cached: Tensor
) -> tuple[Tensor, Tensor]:
    """What the target reads in a step: the last token of a text and the draft, in one launch.

    tokens: (B, T) int64, rows side by side; lengths: (B,) int64; draft_token_ids: (B, γ) int64; cached: (B,) int64,
    written: how many slots the cache holds when it is read. Returns token_ids and positions, (B, γ + 1) int64, the
    latter below `capacity`.
    """
    (batch_size, gamma), device = draft_token_ids.shape, tokens.device
    check("draft_token_ids", draft_token_ids, (batch_size, gamma), (torch.int64,), device)
    check("tokens", tokens, (batch_size, tokens.shape[-1]), (torch.int64,), device)
    for name, rows in (("lengths", lengths), ("cached", cached)):
        check(name, rows, (batch_size,), (torch.int64,), device)
    if _use_triton(device):
        from flashspec.kernels import score

        return score.window(tokens, lengths, draft_token_ids, capacity, cached)
    if _use_native(tokens, draft_token_ids):
        return native_step.window(tokens, lengths, draft_token_ids, capacity, cached)
    return reference.window(tokens, lengths, draft_token_ids, capacity, cached)


def _use_triton(device: torch.device) -> bool:
    return usable(device) or (TRITON_AVAILABLE and os.environ.get("TRITON_INTERPRET") == "1")


def _use_native(*tensors: Tensor) -> bool:
    """On a CPU with a compiler; fake tensors have no memory to point to."""
    return (
        all(type(tensor) is Tensor and tensor.device.type == "cpu" for tensor in tensors) and native_build.available()
    )
