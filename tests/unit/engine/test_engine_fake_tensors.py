"""A step reads nothing back: it runs where tensors have shapes but no values, as it must inside a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from flashspec.config import SamplingConfig
from flashspec.core import Draft
from flashspec.drafters.base import DraftContext, Drafter, NoDraft, Proposer
from flashspec.drafters.eagle import EagleDrafter, EagleHead, Fusion
from flashspec.drafters.early_exit import EarlyExitDrafter
from flashspec.drafters.medusa import Beside, MedusaDrafter, MedusaHeads
from flashspec.drafters.model import ModelDrafter
from flashspec.drafters.ngram import NgramDrafter
from flashspec.engine.outcome import HEAD, Outcome
from flashspec.engine.state import DecodeState
from flashspec.engine.step import step
from flashspec.kernels import native_build
from flashspec.models.decoder import Decoder, DecoderConfig, DecoderWeights, LayerWeights
from flashspec.sampling.sampler import make_sampler

VOCAB, HIDDEN, LENGTH = 50, 32, 2
PROMPTS = [[1, 2, 3, 1, 2], [4, 4]]
SETTINGS = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.8},
    "top-k, top-p, min-p": {"top_k": 5, "top_p": 0.9, "min_p": 0.1},
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "min_tokens and bias": {"min_tokens": 4, "logit_bias": {3: 1.0}},
    "coupled": {"variant": "coupled"},
    "typical": {"variant": "typical"},
    "log-probabilities": {"logprobs": 3},
}


@pytest.fixture(autouse=True)
def fake_mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(native_build, "available", lambda: False)  # C++ reads values
    with torch.inference_mode(), FakeTensorMode():
        yield


def tiny_decoder(num_layers: int = 2) -> Decoder:
    """Two heads over one kv head of 16."""
    config = DecoderConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        max_context=64,
        norm_eps=1e-5,
        inv_freq=tuple(0.5**i for i in range(8)),
        windows=(None,) * num_layers,
    )
    layer = LayerWeights(
        attention_norm=torch.ones(HIDDEN),
        qkv=torch.randn(64, HIDDEN),
        output=torch.randn(HIDDEN, 32),
        mlp_norm=torch.ones(HIDDEN),
        gate_up=torch.randn(96, HIDDEN),
        down=torch.randn(HIDDEN, 48),
    )
    embedding = torch.randn(VOCAB, HIDDEN)
    return Decoder(config, DecoderWeights(embedding, (layer,) * num_layers, torch.ones(HIDDEN), embedding))


def tiny_eagle() -> EagleHead:
    """Its layer reads twice the width; it knows half of the vocabulary."""
    model = tiny_decoder(1)
    layer = replace(model.weights.layers[0], qkv=torch.randn(64, 2 * HIDDEN))
    weights = replace(model.weights, layers=(layer,), lm_head=torch.randn(VOCAB // 2, HIDDEN))
    fusion = Fusion((1, 1, 1), torch.randn(HIDDEN, 3 * HIDDEN), torch.ones(HIDDEN), torch.arange(0, VOCAB, 2))
    return EagleHead(model.config, weights, fusion)


def tiny_medusa() -> MedusaHeads:
    block = torch.randn(LENGTH, HIDDEN, HIDDEN), torch.randn(LENGTH, HIDDEN)
    beside = Beside((1,), torch.randn(HIDDEN, 3 * HIDDEN), torch.randn(VOCAB, HIDDEN))
    return MedusaHeads((block,), 2, torch.randn(LENGTH, VOCAB, HIDDEN), beside=beside)


def start_state(**settings: object) -> DecodeState:
    model, config = tiny_decoder(), SamplingConfig(**settings)  # type: ignore[arg-type]
    sampler = make_sampler(config, PROMPTS, [0], VOCAB, 1, model.device)
    state = DecodeState.create(PROMPTS, [20, 20], [0], model, sampler, config.logprobs)
    state.prepare()
    return state


def take(state: DecodeState, drafter: Drafter | None) -> Outcome:
    proposer = drafter.start(state) if drafter else NoDraft()
    proposer.prepare(state)
    return step(state, proposer, LENGTH if drafter else 0)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("arm", ["plain", "ngram", "model", "early-exit", "eagle", "medusa"])
def test_a_step_needs_no_values(arm: str, settings: dict[str, object]) -> None:
    state = start_state(**settings)
    drafters = {"ngram": NgramDrafter(), "model": ModelDrafter(tiny_decoder(1)), "early-exit": EarlyExitDrafter(1)}
    drafters |= {"eagle": EagleDrafter(tiny_eagle()), "medusa": MedusaDrafter(tiny_medusa())}
    drafter = drafters.get(arm)
    outcome = take(state, drafter)
    assert outcome.packed.shape == (2, HEAD + 1 + (LENGTH if drafter else 0))
    assert (outcome.logprobs is not None) == ("logprobs" in settings)


class Peeking(Drafter):
    """Looks at a value, by one of the ways there are."""

    def __init__(self, way: str) -> None:
        self.way = way

    def start(self, context: DraftContext) -> Proposer:
        way = self.way

        class Peeks(Proposer):
            def propose(self, context: DraftContext, length: int) -> Draft:
                last = context.tokens[0, 0]
                value = {"item": last.item, "int": lambda: int(last), "branch": lambda: bool(last > 0)}[way]()
                token_ids = torch.full((len(context.texts), length), int(value))
                return Draft(token_ids, context.lengths * 0 + length)

        return Peeks()


@pytest.mark.parametrize("way", ["item", "int", "branch"])
def test_a_drafter_that_reads_back_is_noticed(way: str) -> None:
    with pytest.raises(DataDependentOutputException):
        take(start_state(temperature=0), Peeking(way))


def test_a_transform_that_reads_back_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    state = start_state(temperature=0.8, logit_bias={1: 1.0})
    monkeypatch.setattr(
        type(state.sampler.transforms),
        "shift",
        lambda self, logits, positions, draft_ids: logits + 1 if logits.max() > 0 else logits,
    )
    with pytest.raises(DataDependentOutputException):
        take(state, None)
