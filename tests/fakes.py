"""Small stand-ins that can be checked by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from flashspec.core import Draft
from flashspec.drafters.base import DraftContext, Drafter, Proposer
from flashspec.models.base import Features, KVCache


class MarkovModel:
    """The next token depends on the last two, which are read back from the cache: a cache that is wrong shows.

    table: (V, V, V) logits of the next token by (token before the last, last); a text's first token follows token 0.
    """

    def __init__(self, table: Tensor, max_context: int = 512) -> None:
        self.table = table
        self.vocab_size = table.shape[-1]
        self.hidden_size = 2
        self.max_context = max_context
        self.num_layers = 2
        self.device = table.device
        self.dtype = torch.float32

    @classmethod
    def random(cls, vocab_size: int, seed: int, sharpness: float = 1.5, max_context: int = 512) -> MarkovModel:
        generator = torch.Generator().manual_seed(seed)
        return cls(sharpness * torch.randn(vocab_size, vocab_size, vocab_size, generator=generator), max_context)

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        empty = torch.full((1, batch_size, 1, capacity, 1), -1.0)
        return KVCache(empty, empty.clone())

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cache: KVCache,
        bound: int,
        num_layers: int | None = None,
        features: Features | None = None,
    ) -> Tensor:
        seen = cache.keys[0, :, 0, :, 0]  # (B, capacity)
        seen.scatter_(1, positions, token_ids.float())
        assert int(positions.max()) < bound <= cache.capacity
        last = seen.gather(1, positions).long()
        before = torch.where(positions > 0, seen.gather(1, (positions - 1).clamp(min=0)).long(), 0)
        if num_layers is not None:  # an early exit sees the last token only
            before = torch.zeros_like(before)
        hidden = torch.stack([before, last], -1).float()
        for layer in features.layers if features else ():
            features.record(layer, positions, hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        before, last = hidden.long().unbind(-1)
        return self.table[before, last]

    def next_logits(self, text: list[int]) -> Tensor:
        """(V,) after a text, without the cache."""
        return self.table[text[-2] if len(text) > 1 else 0, text[-1]]

    def next_logprobs(self, text: list[int]) -> Tensor:
        return self.next_logits(text).log_softmax(-1)


class ScriptedDrafter(Drafter):
    """Proposes what `script(text, length)` says for each row."""

    def __init__(self, script, name: str = "scripted") -> None:  # type: ignore[no-untyped-def]
        self.script = script
        self.name = name

    def start(self, context: DraftContext) -> Proposer:
        drafter = self

        class Scripted(Proposer):
            def propose(self, context: DraftContext, length: int) -> Draft:
                rows = [list(drafter.script(text, length)) for text in context.texts]
                padded = [row + [0] * (length - len(row)) for row in rows]
                return Draft(torch.tensor(padded).view(len(rows), length), torch.tensor([len(row) for row in rows]))

        return Scripted()


def greedy_text(model: MarkovModel, prompt: list[int], count: int) -> list[int]:
    """What plain greedy decoding writes."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(model.next_logprobs(text).argmax()))
    return text[len(prompt) :]
