"""The decoder's kernels in plain PyTorch: what each of them computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flashspec.kernels.decoding import InBytes, Weight


def _product(x: Tensor, weight: Weight) -> Tensor:
    if not isinstance(weight, InBytes):
        return F.linear(x, weight).float()
    found, scales = round_to_bytes(x, weight.columns)
    sums = F.linear(found.double(), weight.values.double())  # (M, 2, N), exact
    return ((256 * sums[:, 0] + sums[:, 1]) * weight.scales * scales[:, None]).float()


def round_to_bytes(x: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    x = x.float() * columns.float()
    largest = x.abs().amax(1, keepdim=True).clamp(min=1e-30)
    steps = (x * (32512 / largest) + 0.5).floor().nan_to_num(0.0).int()
    high = (steps + 128) >> 8
    return torch.stack((high, steps - high * 256), 1).to(torch.int8), (largest / 32512)[:, 0] + (x * 0).sum(1)


def project(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    squares: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    out = _product(x, weight)
    if squares is not None:
        out *= _scale(squares, x.shape[1], eps)
    return (out if bias is None else out + bias).to(dtype)


def project_gated(x: Tensor, weight: Weight, squares: Tensor, eps: float) -> Tensor:
    gate, up = project(x, weight, None, squares, eps, torch.float32).chunk(2, 1)
    return (F.silu(gate) * up).to(x.dtype)


def project_add(
    x: Tensor, weight: Weight, bias: Tensor | None, hidden: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    out = hidden + project(x, weight, bias, None, 0.0, hidden.dtype)
    return out, out * norm, out.float().square().sum(1, keepdim=True)


def attend(
    qkv: Tensor,
    waves: Tensor | None,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    qk_norm: Tensor | None,
    eps: float,
    window: int | None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    asked: int | None = None,
) -> Tensor:
    (batch, queries), (_, n_kv, capacity, dim) = positions.shape, keys.shape
    heads = qkv.view(batch, queries, -1, dim)
    rotated, new_values = heads.tensor_split((heads.shape[2] - n_kv,), dim=2)
    if qk_norm is not None:
        rotated = F.rms_norm(rotated.float(), (dim,), eps=eps) * qk_norm
    if waves is not None:
        cos, sin = waves.view(batch, queries, 1, 2, dim // 2).unbind(3)
        first, second = rotated.chunk(2, 3)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), 3)
    rotated = rotated.to(qkv.dtype)
    rows = torch.arange(batch, device=qkv.device)[:, None]
    keys.transpose(1, 2).index_put_((rows, positions), rotated[:, :, -n_kv:])
    values.transpose(1, 2).index_put_((rows, positions), new_values)

    slots = torch.arange(capacity, device=qkv.device)
    visible = slots <= positions[..., None]  # (B, Q, capacity)
    if window is not None:
        visible &= slots > positions[..., None] - window
    grouped = rotated[:, :, :-n_kv].reshape(batch, queries, n_kv, -1, dim).permute(0, 2, 3, 1, 4)  # (B, K, G, Q, D)
    scores = grouped.float() @ keys.float()[:, :, None].mT * (scale or dim**-0.5)  # (B, K, G, Q, capacity)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    if sinks is not None:
        extra = sinks.float().view(n_kv, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, extra), -1)
    weights = scores.softmax(-1)[..., :capacity]
    out = weights @ values.float()[:, :, None]
    out = out[:, :, :, -(asked or queries) :]
    return out.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1).to(qkv.dtype)


def embed(
    token_ids: Tensor,
    positions: Tensor,
    embedding: Tensor,
    norm: Tensor,
    frequencies: Tensor,
    wave_scale: float,
    n_squares: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = F.embedding(token_ids.flatten(), embedding)
    squares = F.pad(hidden.float().square().sum(1, keepdim=True), (0, n_squares - 1))
    return hidden, hidden * norm, squares, _waves(positions, frequencies, wave_scale, embedding.dtype)


def join(
    token_ids: Tensor,
    positions: Tensor,
    embedding: Tensor,
    embedding_norm: Tensor,
    hidden: Tensor,
    hidden_norm: Tensor,
    frequencies: Tensor,
    wave_scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    embedded = normalise(F.embedding(token_ids.flatten(), embedding), embedding_norm, eps)
    waves = _waves(positions, frequencies, wave_scale, embedding.dtype)
    return torch.cat((embedded, normalise(hidden, hidden_norm, eps)), 1), waves


def record(states: Sequence[Tensor], positions: Tensor, buffer: Tensor) -> None:
    rows = torch.arange(len(positions), device=positions.device)[:, None]
    buffer.index_put_((rows, positions), torch.stack(tuple(states), 1).view(*positions.shape, *buffer.shape[2:]))


def recall(
    tokens: Tensor,
    lengths: Tensor,
    cached: Tensor,
    buffer: Tensor,
    parts: tuple[int, ...],
    start: Tensor | None,
    size: int,
    ahead: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slots = lengths[:, None] - 1 + torch.arange(-size, ahead, device=lengths.device)  # (B, size + ahead)
    if start is not None:
        places = start[:, None] + torch.arange(size, device=lengths.device)
        slots[:, :size] = torch.minimum(places, lengths[:, None] - 2)
    slots, following = slots.clamp(0, buffer.shape[1] - 1).tensor_split((size,), 1)
    rows = torch.arange(len(slots), device=slots.device)[:, None]
    states = buffer[rows, slots]  # (B, size, n, width)
    if parts != tuple(range(buffer.shape[2])):
        states = torch.stack([states[:, :, part] for part in parts], 2)
    torch.minimum(slots[:, -1] + 1, lengths - 1, out=cached)
    return tokens.gather(1, slots + 1), slots, states.flatten(2), following


def normalise(hidden: Tensor, norm: Tensor, eps: float) -> Tensor:
    return F.rms_norm(hidden, norm.shape, norm, eps)


def add_norm(hidden: Tensor, delta: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out = hidden + delta
    return out, normalise(out, norm, eps)


def gate(gate_up: Tensor) -> Tensor:
    first, second = gate_up.float().chunk(2, 1)
    return (F.silu(first) * second).to(gate_up.dtype)


def _waves(positions: Tensor, frequencies: Tensor, wave_scale: float, dtype: torch.dtype) -> Tensor:
    angles = positions.flatten()[:, None].float() * frequencies
    return (torch.stack((angles.cos(), angles.sin()), 1) * wave_scale).to(dtype).float()


def _scale(squares: Tensor, width: int, eps: float) -> Tensor:
    return torch.rsqrt(squares.sum(1, keepdim=True) / width + eps)
