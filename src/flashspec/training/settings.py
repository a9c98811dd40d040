"""What a training may be told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Progress = Callable[[str, float | None], None]  # what is being done, and how much of it (0..1; None: unknown)


class Kind(StrEnum):
    EAGLE3 = "eagle3"
    MEDUSA = "medusa"
    TINY = "tiny"


@dataclass(frozen=True, slots=True)
class Settings:
    """seconds: for everything, of which the target writes for at most `writing_share`, and at most `most_tokens`.

    draft_vocab: the most entries of the draft vocabulary, which is smaller where fewer cover `coverage` of the text.
    intermediate_size, layers: of the drafter; None: the target's size. shares_lm_head: use the target's rows in place
    of trained ones, and store none; Medusa heads then read more than the public layout lets them.
    length: tokens a text at most. unroll: drafts deep that an EAGLE-3 head is trained, and how many heads a Medusa set
    has. decay: weight of a draft step over the one before. batch_tokens None: what suits the device. measure_every:
    seconds between two looks at the held-out text.
    """

    kind: Kind = Kind.EAGLE3
    seconds: float = 1200.0
    seed: int = 0
    writing_share: float = 0.3
    most_tokens: int = 30_000_000
    rows: int | None = None
    length: int = 512
    draft_vocab: int = 16384
    coverage: float = 0.985
    intermediate_size: int | None = None
    layers: int = 1
    shares_lm_head: bool = False
    unroll: int = 5
    decay: float = 0.8
    learning_rate: float = 1e-3
    warm_up: float = 0.03
    batch_tokens: int | None = None
    measure_every: float = 60.0
    gamma: int = 4

    @classmethod
    def of(cls, kind: Kind, *, shares_lm_head: bool = False, **options: Any) -> Settings:
        """With layers, unroll and decay as they suit the kind, where the options do not name them."""
        suited: dict[Kind, dict[str, Any]] = {
            Kind.EAGLE3: {},
            Kind.MEDUSA: {"layers": 3 if shares_lm_head else 1, "unroll": 4, "decay": 0.6},
            Kind.TINY: {"layers": 2},
        }
        return cls(kind=kind, shares_lm_head=shares_lm_head, **suited[kind] | options)

    def __post_init__(self) -> None:
        for name in ("seconds", "learning_rate", "measure_every", "decay"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it should be a number above 0")
        for name in ("layers", "unroll", "gamma", "draft_vocab", "most_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it should be at least 1")
        if self.length < 16:
            raise ValueError(f"length is {self.length}; it should be at least 16 tokens")
        if not 0 < self.coverage <= 1 or not 0 < self.writing_share < 1:
            raise ValueError("coverage should be in (0, 1], writing_share in (0, 1)")
