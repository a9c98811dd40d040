"""The loss of a head, and how long drafts of it live on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashspec.training.batches import Batch, Lesson
from flashspec.training.features import Reading
from flashspec.training.heads import DraftHead
from flashspec.training.layers import compiled
from flashspec.training.vocabulary import DraftVocabulary

CHUNK = 4096  # positions whose scores are in memory at a time


@dataclass(frozen=True, slots=True)
class Measure:
    """One look at the held-out text. acceptance: of draft token i, given that those before it were accepted.
    length: tokens a step, the target's own included, at that draft length. tokens: trained on until then."""

    seconds: float
    tokens: int
    loss: float
    acceptance: tuple[float, ...]
    length: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Measure:
        return cls(**{**document, "acceptance": tuple(document["acceptance"])})


@dataclass(frozen=True, slots=True)
class Teacher:
    """The target's distribution over the draft vocabulary. rows: (V', hidden), its LM head there, in its dtype."""

    vocabulary: DraftVocabulary
    rows: Tensor


@compiled
def _cross_entropy(hidden: Tensor, rows: Tensor, final: Tensor, target_rows: Tensor, counts: Tensor) -> Tensor:
    """Of what (n, hidden) says through rows (V', hidden), to what `final` says through target_rows; summed."""
    with torch.no_grad():
        aims = F.linear(final, target_rows).float().softmax(-1)  # (n, V')
    scores = F.linear(hidden, rows.to(hidden.dtype)).float()
    return (F.cross_entropy(scores, aims, reduction="none") * counts).sum()


def draft_loss(head: DraftHead, reading: Reading, lesson: Lesson, teacher: Teacher, decay: float) -> Tensor:
    """Cross entropy of each draft step to the target's distribution at its position, deeper steps weighing less."""
    final = reading.final.flatten(0, 1)
    total, weights = final.new_zeros((), dtype=torch.float32), 0.0
    for step, hidden in enumerate(head.unroll(reading, len(lesson.steps))):
        hidden, rows = hidden.flatten(0, 1), head.lm_rows(step)
        chunks = zip(*(torch.split(part, CHUNK) for part in lesson.steps[step]), strict=True)
        losses = [
            _cross_entropy(hidden.index_select(0, anchors), rows, final[places], teacher.rows, counts)
            for anchors, places, counts in chunks
        ]
        total = total + decay**step * sum(losses) / lesson.steps[step][2].sum().clamp(min=1)
        weights += decay**step
    return total / weights


def accepted_lengths(
    head: DraftHead, reading: Reading, batch: Batch, vocabulary: DraftVocabulary, gamma: int
) -> Tensor:
    """(B, T) by anchor: how many of `gamma` greedy draft tokens equal the text. A step reads the text's token, which
    is the draft's own as long as anything is accepted."""
    alive = torch.ones_like(batch.token_ids, dtype=torch.bool)
    accepted = torch.zeros_like(batch.token_ids)
    for step, hidden in enumerate(head.unroll(reading, gamma)):
        wanted, written = batch.drafted(step)
        matches = torch.zeros_like(alive)
        matches[written] = vocabulary.ids[head.score(step, hidden[written]).argmax(-1)] == wanted[written]
        alive = alive & matches
        accepted += alive
    return accepted


def walk(accepted: Sequence[int], start: int, length: int, gamma: int) -> list[int]:
    """Decode along one text: the accepted count of every step. accepted: by anchor. The first step knows the prompt,
    of `start` tokens; the walk ends where less than a whole draft is left."""
    steps, anchor = [], max(start - 2, 0)
    while anchor + 2 + gamma <= length:
        steps.append(accepted[anchor])
        anchor += accepted[anchor] + 1
    return steps


def summarise(steps: Sequence[int], gamma: int) -> tuple[tuple[float, ...], float]:
    """(acceptance by draft position, tokens a step) of the accepted counts of all steps."""
    reached = [sum(count >= position for count in steps) for position in range(gamma + 1)]
    rates = tuple(reached[i + 1] / reached[i] if reached[i] else 0.0 for i in range(gamma))
    return rates, 1 + sum(steps) / len(steps) if steps else 1.0
