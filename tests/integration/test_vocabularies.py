"""Vocabularies whose size is no round number: no id at or beyond the end is ever written."""

from __future__ import annotations

import pytest
import torch
from decoding import decode
from torch import Tensor

from flashspec.drafters.model import ModelDrafter
from flashspec.drafters.ngram import NgramDrafter
from flashspec.models.base import Features, KVCache

SETTINGS = {
    "greedy": {"temperature": 0},
    "rejection": {"temperature": 5.0},
    "coupled": {"temperature": 5.0, "variant": "coupled"},
    "typical": {"temperature": 5.0, "variant": "typical"},
    "transforms": {"top_k": 50, "top_p": 0.95, "min_p": 0.001, "presence_penalty": 1.0},
}


class Tail:
    """All of its mass lies on the last `likely` of the `real` tokens; a padded vocabulary holds some more, at -inf."""

    def __init__(self, vocab_size: int, likely: int = 3, padding: int = 0) -> None:
        self.row = torch.full((vocab_size,), -500.0)
        real = vocab_size - padding
        self.row[real - likely : real] = torch.linspace(0, 1, likely)
        self.row[real:] = float("-inf")
        self.real = real
        self.vocab_size = vocab_size
        self.hidden_size = 1
        self.max_context = 64
        self.num_layers = 1
        self.device = torch.device("cpu")
        self.dtype = torch.float32

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        return KVCache(torch.zeros(1, batch_size, 1, capacity, 1), torch.zeros(1, batch_size, 1, capacity, 1))

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cache: KVCache,
        bound: int,
        num_layers: int | None = None,
        features: Features | None = None,
    ) -> Tensor:
        return torch.zeros(*token_ids.shape, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.row.expand(*hidden.shape[:-1], -1)


def written(target: Tail, settings: dict) -> list[int]:
    drafters = {"model": ModelDrafter(Tail(target.vocab_size, likely=2)), "ngram": NgramDrafter()}
    rows = decode(target, [[1, 1], [2]], ["model:3", "plain", "ngram:2"], drafters, 8, **settings)
    return [token_id for row in rows for token_id in row]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("vocab_size", [100, 8193, 10000, 32000, 128256, 151936])
def test_no_id_lies_outside_the_vocabulary(vocab_size: int, settings: dict) -> None:
    token_ids = written(Tail(vocab_size), settings)
    assert len(token_ids) == 16 and max(token_ids) == vocab_size - 1 and min(token_ids) >= vocab_size - 3


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("vocab_size", [104, 8256])
def test_padding_is_never_written(vocab_size: int, settings: dict) -> None:
    """The drafter, which knows nothing of the padding, proposes it all the time."""
    target = Tail(vocab_size, padding=7)
    assert max(written(target, settings)) == target.real - 1
