"""A smaller language model with the target's vocabulary writes the draft, one token after another."""

from __future__ import annotations

import torch
from torch import Tensor

from flashspec.core import Draft
from flashspec.drafters.base import DraftContext, Drafter, Proposer
from flashspec.drafters.chain import slots_from, write_chain
from flashspec.models.base import LanguageModel
from flashspec.models.reader import Reader


class ModelDrafter(Drafter):
    """part: (V',) int64, which tokens the model's logits are of, where it reads all but scores only these."""

    def __init__(self, model: LanguageModel, name: str = "model", part: Tensor | None = None) -> None:
        self.model = model
        self.name = name
        self.part = part

    @classmethod
    def create(cls, target: LanguageModel) -> Drafter:
        raise ValueError("drafter 'model' needs a model: name its id, folder or GGUF file instead")

    def start(self, context: DraftContext) -> Proposer:
        self.check(context.target.model)
        return ModelProposer(context.add_reader(self.model), self.part)

    def check(self, target: LanguageModel) -> None:
        """ValueError unless the two vocabularies are of one size."""
        size, wanted = self.model.vocab_size, target.vocab_size
        if size != wanted:
            raise ValueError(
                f"drafter {self.name!r} has {size} tokens and the target {wanted}: they need the same ones"
            )


class ModelProposer(Proposer):
    def __init__(self, reader: Reader, part: Tensor | None) -> None:
        self.reader = reader
        self.part = part

    def prepare(self, context: DraftContext) -> None:
        room = self.reader.cache.capacity
        if room < context.capacity and context.bound >= room:
            raise RuntimeError(f"the text has outgrown the drafter's context of {room} tokens")
        context.catch_up(self.reader)

    def propose(self, context: DraftContext, length: int) -> Draft:
        reader = self.reader
        # Two tokens at first: the one before the last is unread if the previous draft was accepted whole.
        slots = slots_from(context.lengths, -2, length + 1, reader.cache.capacity)  # (B, length + 1)
        window = context.tokens.gather(1, slots[:, :2])
        hidden = reader.feed(window, slots[:, :2], context.bound)[:, -1]

        def read_next(token_ids: Tensor, offset: int) -> Tensor:
            return reader.feed(token_ids, slots[:, offset + 1, None], context.bound + offset)[:, -1]

        draft = write_chain(context, length, reader.model.logits, hidden, read_next, self.part)
        torch.add(slots[:, -1], 1, out=reader.cached)
        return draft
