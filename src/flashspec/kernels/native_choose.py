"""Draft tokens on a CPU; `flashspec.kernels` checks the arguments and holds the contract."""

from __future__ import annotations

import ctypes

from torch import Tensor

from flashspec.core import Draft
from flashspec.kernels.native_build import library

_DRAFT = ("token_ids", "draft_lengths", "faulty", "weights")
_ROWS = ("seeds", "lengths", "temperature", "part", "bias", "floors")
_SIZES = ("gamma", "size", "offset", "purpose", "least")


class _Choice(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", *_DRAFT, *_ROWS)),
        *((name, ctypes.c_int64) for name in _SIZES),
    )


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
    written = (draft.token_ids, draft.lengths, draft.faulty, draft.logits)
    read = (logits.float(), seeds, lengths, temperature, part, bias, floors)
    first, *alive = (None if tensor is None else tensor.contiguous() for tensor in read)
    choice = _Choice(
        *(None if tensor is None else tensor.data_ptr() for tensor in (first, *written, *alive)),
        draft.token_ids.shape[1],
        logits.shape[1],
        offset,
        -1 if purpose is None else purpose,
        least,
    )
    library().flashspec_choose(ctypes.byref(choice), len(logits))
