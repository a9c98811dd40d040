"""The door to what a decoder of the Llama family does with few tokens. Every function has a twin in reference_decoder.

M tokens; H query heads and K kv heads of D dimensions; matrices are (out, in), those of products perhaps `InBytes`. A
product that reads `squares` takes x * norm weight as its input and applies the RMS norm's scale to its result; squares
(M, any) float32 sum to |x|^2. With up to 16 tokens, a token's results have the same bits whatever other tokens share
the call. Nothing is read back, and every launch can be captured in a CUDA graph.

  embed(token_ids, positions, embedding, norm, frequencies, wave_scale, n_squares)
      -> hidden (M, width), hidden * norm, squares (M, n_squares), waves (M, 2, D / 2): cos and sin, float32
  join(token_ids (B, Q), positions, embedding, embedding_norm, hidden (M, width), hidden_norm, frequencies, wave_scale,
       eps) -> (M, 2 width): normed embeddings beside normed hidden states; waves
  project(x, weight, bias | None, squares | None, eps, dtype) -> (M, out)
  project_gated(x, weight (2I, in), squares, eps) -> silu(gate) * up, (M, I)
  project_add(x, weight, bias | None, hidden, norm) -> new hidden, new hidden * norm, its squares
  round_to_bytes(x (M, K), columns (K,)) -> high and low bytes (M, 2, K) int8, scales (M,): x * columns in steps of its
      largest entry / 32512
  attend(qkv (M, (H + 2K) D), waves | None, positions (B, Q), keys, values (B, K, capacity, D), qk_norm ((H + K, D) |
         None), eps, window | None, scale = D ** -0.5, softcap | None, sinks (H,) | None, asked = Q) -> (B * asked, H D)
      of every row's last queries; writes the new keys and values of all at their positions. A query sees the last
      `window` slots up to its own; slots behind a row's last position are not read. Without waves nothing is rotated.
      softcap: scores become softcap * tanh(score / softcap). sinks: a score for each head that takes its share of the
      weights and adds no value.
  record(states: n of (M, width), positions (B, Q), buffer (B, capacity, n, width)): side by side into their slots
  recall(tokens (B, T), lengths (B,), cached (B,), buffer, parts, start (B,) | None, size, ahead)
      -> token_ids, slots (B, size), states (B, size, len(parts) * width), following (B, ahead): what a head reads of a
      text. A slot is the token behind it and these parts of the buffer. Slots count from `start`, which is not
      `cached`, or are the last; none goes beyond lengths - 2, the last whose token is known, or the buffer.
      following: the slots after that one, a column's side by side. cached: written, how many slots are known
  normalise(hidden, norm, eps), add_norm(hidden, delta, norm, eps), gate(gate_up (M, 2I)): the steps for many tokens
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashspec.kernels.device import usable

SAME_BITS = 16  # tokens, up to which a call's results must not depend on their number
MOST_TOKENS = 64  # of project, project_gated and project_add; the others have no limit of their own
MOST_QUERIES, MOST_ROWS_AND_QUERIES = 256, 1024  # a row and a call, for attend; with more PyTorch attends

available = usable


class InBytes(NamedTuple):
    """A weight (N, K) in eight bits: values (N, K) int8, times scales (N,) float32, times columns (K,) bfloat16.

    A product's inputs are multiplied by `columns` and rounded to sixteen bits; its sums are exact."""

    values: Tensor
    scales: Tensor
    columns: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> InBytes:
        """Columns are brought to one size first, or where inputs are large, and weights therefore small, little would
        be left of these. The largest entry of a row is 127 steps from 0."""
        columns = torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32).div(len(weight) ** 0.5).bfloat16()
        columns = torch.where(columns > 0, columns, 1.0)
        values, scales = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(len(weight), dtype=torch.float32)
        for start in range(0, len(weight), 4096):  # an LM head in float32 may not fit
            rows = slice(start, start + 4096)
            even = weight[rows] / columns.float()
            scales[rows] = even.abs().amax(1) / 127  # of faults NaN or infinite
            values[rows] = even.div_(scales[rows, None]).nan_to_num_(0.0).round_().clamp_(-127, 127)
        return cls(values, scales, columns)


Weight = Tensor | InBytes


class Ends(NamedTuple):
    """What a product's kernel does beside multiplying: of `project` and `project_gated` (bias, squares, eps), of
    `project_add` (bias, hidden, norm; weighted and parts are its other results)."""

    bias: Tensor | None = None
    squares: Tensor | None = None
    hidden: Tensor | None = None
    norm: Tensor | None = None
    weighted: Tensor | None = None
    parts: Tensor | None = None
    eps: float = 0.0

    def pointers(self) -> tuple[Tensor | None, ...]:
        return self[:-1]

    def n_squares(self) -> int:
        return 1 if self.squares is None else self.squares.shape[1]


def values_of(weight: Weight) -> Tensor:
    return weight.values if isinstance(weight, InBytes) else weight
