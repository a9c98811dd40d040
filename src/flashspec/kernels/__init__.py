"""The only door to the kernels: Triton on a GPU, C++ on a CPU with a compiler, PyTorch twins elsewhere; callers never
ask which one runs.

B rows, γ draft tokens (0 is allowed), Q positions, V vocabulary entries. Every function raises ValueError,
naming the argument, for a shape, dtype or device that does not fit. Nothing is read back from a GPU.
`TRITON_INTERPRET=1`, set before triton is imported, runs the Triton kernels on CPU tensors.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from flashspec.kernels import native_build, native_verify, reference, reference_fused

__all__ = ["TRITON_AVAILABLE", "gather_accepted", "philox_gumbel", "philox_uniform", "verify_logits", "verify_tokens"]

TRITON_AVAILABLE = find_spec("triton") is not None

_LOGPROB_DTYPES = (torch.float32, torch.bfloat16)
_INDEX_DTYPES = (torch.int32, torch.int64)
_LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_VARIANTS = ("rejection", "coupled", "greedy")


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
    _check("draft_logprobs", draft_logprobs, shape, _LOGPROB_DTYPES, device)
    _check("target_logprobs", target_logprobs, shape, _LOGPROB_DTYPES, device)
    _check("u", u, shape[:2], (torch.float32,), device)
    _check("draft_token_ids", draft_token_ids, shape[:2], (torch.int64,), device)
    _check_ids_on_cpu(draft_token_ids, draft_logprobs)
    if _use_triton(device):
        from flashspec.kernels import verify

        return verify.verify_tokens(draft_logprobs, target_logprobs, u, draft_token_ids)
    return reference.verify_tokens(draft_logprobs, target_logprobs, u, draft_token_ids)


def gather_accepted(token_ids: Tensor, first_rejection: Tensor) -> Tensor:
    """token_ids (B, γ) int64, first_rejection (B,) int32 or int64 -> (B, γ) int64: row b's first
    first_rejection[b] tokens, -1 after them."""
    if token_ids.dim() != 2:
        raise ValueError(f"token_ids should be (B, γ): got shape {tuple(token_ids.shape)}")
    _check("token_ids", token_ids, tuple(token_ids.shape), (torch.int64,), token_ids.device)
    _check("first_rejection", first_rejection, token_ids.shape[:1], _INDEX_DTYPES, token_ids.device)
    if _use_triton(token_ids.device):
        from flashspec.kernels import gather

        return gather.gather_accepted(token_ids, first_rejection)
    return reference.gather_accepted(token_ids, first_rejection)


def philox_uniform(seeds: Tensor, positions: Tensor, purpose: int) -> Tensor:
    """seeds (B,) int64, positions (B, Q) int64, purpose in [0, 2^32) -> (B, Q) float32 uniforms.

    A function of (seed, position, purpose): an odd multiple of 2^-24, so 0 < u < 1. Kernel and twin give the
    same bits. It shares its hash with token 0 of `philox_gumbel`, so the two need different purposes.
    """
    _check_counter(seeds, positions, purpose)
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
    _check_counter(seeds, positions, purpose)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """A whole verification from raw logits, in two launches.

    target_logits: (B, γ + 1, V) float32, bfloat16 or float16; position i decides text position lengths + i.
    draft_token_ids: (B, γ) int64, of which row b proposes the first draft_lengths[b], (B,) int64.
    draft_weights: (B, γ, V) float32, bfloat16 or float16 log-weights that the tokens were drawn from; None: one-hot,
    and so it counts unless variant is 'rejection'. seeds, lengths: (B,) int64. temperature: (B,) float32, divides the
    target's logits; rows at 0 are greedy. For top-k, top-p, min-p and penalties pass masked or shifted logits.
    variant: 'rejection' (Leviathan, Kalman and Matias 2023, Algorithm 1: the next token is drawn from max(0, p - q)
    after a rejection, from p after a whole draft); 'coupled' (Daliri, Musco and Suresh 2024: accept while the draft is
    what the target draws with the noise that the drafter used, so the text depends on no draft); 'greedy', which is the
    latter without noise and reads no temperature.
    Returns num_accepted (B,) int64, next_token (B,) int64 in [0, V), and failed (B,) bool: rows whose other two mean
    nothing, since a position up to num_accepted holds NaN or +inf, or nothing but -inf. A draft token outside [0, V)
    is rejected; so is one whose weights are not finite, and the next token is then drawn from the target alone.
    """
    shape = tuple(target_logits.shape)
    if len(shape) != 3 or shape[1] < 1 or shape[2] < 1:
        raise ValueError(f"target_logits should be (B, γ + 1, V) with V >= 1: got shape {shape}")
    if variant not in _VARIANTS:
        raise ValueError(f"variant should be one of {', '.join(_VARIANTS)}: got {variant!r}")
    batch_size, gamma, device = shape[0], shape[1] - 1, target_logits.device
    _check("target_logits", target_logits, shape, _LOGIT_DTYPES, device)
    _check("draft_token_ids", draft_token_ids, (batch_size, gamma), (torch.int64,), device)
    if draft_weights is not None:
        _check("draft_weights", draft_weights, (batch_size, gamma, shape[2]), _LOGIT_DTYPES, device)
    for name, rows in (("draft_lengths", draft_lengths), ("seeds", seeds), ("lengths", lengths)):
        _check(name, rows, (batch_size,), (torch.int64,), device)
    _check("temperature", temperature, (batch_size,), (torch.float32,), device)
    arguments = (target_logits, draft_token_ids, draft_lengths, draft_weights, seeds, lengths, temperature, variant)
    if _use_triton(device):
        from flashspec.kernels import fused

        return fused.verify_logits(*arguments)
    if _use_native(*(tensor for tensor in arguments if isinstance(tensor, Tensor))):
        return native_verify.verify_logits(*arguments)
    return reference_fused.verify_logits(*arguments)


def _use_triton(device: torch.device) -> bool:
    return TRITON_AVAILABLE and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def _use_native(*tensors: Tensor) -> bool:
    """On a CPU with a compiler; fake tensors have no memory to point to."""
    return (
        all(type(tensor) is Tensor and tensor.device.type == "cpu" for tensor in tensors) and native_build.available()
    )


def _check(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} should have shape {tuple(shape)}: got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} should be {' or '.join(map(str, dtypes))}: got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} should be on {device}: got {tensor.device}")


def _check_counter(seeds: Tensor, positions: Tensor, purpose: int) -> None:
    if positions.dim() != 2:
        raise ValueError(f"positions should be (B, Q): got shape {tuple(positions.shape)}")
    _check("positions", positions, tuple(positions.shape), (torch.int64,), positions.device)
    _check("seeds", seeds, tuple(positions.shape[:1]), (torch.int64,), positions.device)
    if not 0 <= purpose < 2**32:
        raise ValueError(f"purpose should be in [0, 2^32): got {purpose}")


def _check_ids_on_cpu(token_ids: Tensor, logprobs: Tensor) -> None:
    """A CPU's gather looks at every id itself, without the read-back that fake tensors forbid."""
    if token_ids.device.type == "cpu":
        try:
            logprobs.gather(2, token_ids.unsqueeze(2))
        except RuntimeError as error:
            raise ValueError(f"draft_token_ids should be in [0, {logprobs.shape[2]}): {error}") from None
