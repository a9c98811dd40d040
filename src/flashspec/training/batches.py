"""Texts as padded batches, in an order that is a function of seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flashspec.training.rollouts import Rollouts

SORTED = 4096  # texts sorted by length at a time, so that padding stays small and the order random
ALIGNED = 8  # positions; fused attention wants its masks so


@dataclass(frozen=True, slots=True)
class Batch:
    """token_ids: (B, T) int64, 0 behind the end. starts, lengths: (B,) int64: the target wrote start..length - 1."""

    token_ids: Tensor
    starts: Tensor
    lengths: Tensor

    def drafted(self, step: int) -> tuple[Tensor, Tensor]:
        """By anchor, (B, T): the token that draft step `step` should say, and whether the target wrote one there."""
        length = self.token_ids.shape[1]
        positions = torch.arange(length, device=self.token_ids.device) + 2 + step
        wanted = self.token_ids.gather(1, positions.clamp(max=length - 1).expand_as(self.token_ids))
        return wanted, (positions >= self.starts[:, None]) & (positions < self.lengths[:, None])

    def to(self, device: torch.device) -> Batch:
        return Batch(*(_sent(tensor, device) for tensor in (self.token_ids, self.starts, self.lengths)))


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the draft steps of a batch are to say, as indices into its B * T.

    steps: for each step its anchors (m,), the positions whose next token they should say (m,), and what each counts
    (m,) float32: 1, or 0 where an entry only fills up."""

    steps: tuple[tuple[Tensor, Tensor, Tensor], ...]

    @classmethod
    def of(cls, batch: Batch, known: Tensor, steps: int, multiple: int = 1) -> Lesson:
        """known: (V,) bool, the tokens that can be drafted: the others' positions count for nothing. multiple: of which
        every m is one."""
        parts = []
        for step in range(steps):
            wanted, written = batch.drafted(step)
            anchors = (written & known[wanted]).flatten().nonzero()[:, 0]
            counts = F.pad(torch.ones(len(anchors)), (0, -len(anchors) % multiple))
            anchors = F.pad(anchors, (0, len(counts) - len(anchors)))
            parts.append((anchors, anchors + 1 + step, counts))
        return cls(tuple(parts))

    def to(self, device: torch.device) -> Lesson:
        return Lesson(tuple(tuple(_sent(part, device) for part in step) for step in self.steps))  # type: ignore[misc]


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for what it is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def make_batch(rollouts: Rollouts, indices: Sequence[int]) -> Batch:
    lengths = rollouts.lengths[list(indices)]
    width = -(-int(lengths.max()) // ALIGNED) * ALIGNED
    token_ids = torch.zeros(len(indices), width, dtype=torch.int64)
    for row, index in enumerate(indices):
        text = rollouts.token_ids[rollouts.offsets[index] : rollouts.offsets[index + 1]]
        token_ids[row, : len(text)] = text
    return Batch(token_ids, rollouts.starts[list(indices)], lengths)


def epoch_order(rollouts: Rollouts, most_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """The texts to train on, as batches of at most so many positions (one text at least)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    lengths = rollouts.lengths.tolist()
    indices = (~rollouts.held_out).nonzero()[:, 0]
    shuffled = indices[torch.randperm(len(indices), generator=generator)].tolist()
    batches: list[list[int]] = []
    for begin in range(0, len(shuffled), SORTED):
        by_length = sorted(shuffled[begin : begin + SORTED], key=lengths.__getitem__)
        batches += cut(by_length, lengths, most_tokens)
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


def cut(indices: Sequence[int], lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Neighbours together, at most so many padded positions a batch."""
    batches: list[list[int]] = []
    widest = 0
    for index in indices:
        width = max(widest, lengths[index])
        if batches and width * (len(batches[-1]) + 1) <= most_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
            width = lengths[index]
        widest = width
    return batches


def held_out_order(rollouts: Rollouts, most_tokens: int, in_all: int) -> list[list[int]]:
    """The first held-out texts, of at most `in_all` tokens together (one at least), as batches."""
    lengths = rollouts.lengths.tolist()
    chosen: list[int] = []
    total = 0
    for index in rollouts.held_out.nonzero()[:, 0].tolist():
        if chosen and total + lengths[index] > in_all:
            break
        chosen.append(index)
        total += lengths[index]
    return cut(sorted(chosen, key=lengths.__getitem__), lengths, most_tokens)


def endless(
    rollouts: Rollouts, most_tokens: int, seed: int, epoch: int, place: int
) -> Iterator[tuple[int, int, list[int]]]:
    """From a place on: (epoch and place of the batch behind this one, this batch)."""
    while True:
        order = epoch_order(rollouts, most_tokens, seed, epoch)
        for here in range(place, len(order)):
            following = (epoch, here + 1) if here + 1 < len(order) else (epoch + 1, 0)
            yield *following, order[here]
        epoch, place = epoch + 1, 0
