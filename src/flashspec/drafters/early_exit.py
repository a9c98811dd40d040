"""The target's own first layers write the draft: no second model and, since verification rewrites the same slots
with the same values, no second cache."""

from __future__ import annotations

from torch import Tensor

from flashspec.core import Draft
from flashspec.drafters.base import DraftContext, Drafter, Proposer
from flashspec.drafters.chain import slots_from, write_chain
from flashspec.models.base import LanguageModel


class EarlyExitDrafter(Drafter):
    """num_layers: how many layers run before the exit; by name it is a third of the target's."""

    name = "early-exit"

    def __init__(self, num_layers: int) -> None:
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}; it should be at least 1")
        self.num_layers = num_layers

    @classmethod
    def create(cls, target: LanguageModel) -> EarlyExitDrafter:
        return cls(max(1, target.num_layers // 3))

    def start(self, context: DraftContext) -> Proposer:
        if self.num_layers >= context.target.model.num_layers:
            raise ValueError(f"num_layers is {self.num_layers}; the target has {context.target.model.num_layers}")
        return EarlyExitProposer(self.num_layers)


class EarlyExitProposer(Proposer):
    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers

    def propose(self, context: DraftContext, length: int) -> Draft:
        model, cache = context.target.model, context.target.cache
        slots = slots_from(context.lengths, -1, length, cache.capacity)  # (B, length), the last committed token's first

        def read_next(token_ids: Tensor, offset: int) -> Tensor:
            bound = min(context.bound + offset, cache.capacity)
            return model.forward(token_ids, slots[:, offset, None], cache, bound, self.num_layers)[:, -1]

        last = context.tokens.gather(1, slots[:, :1])
        return write_chain(context, length, model.logits, read_next(last, 0), read_next)
