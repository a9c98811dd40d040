"""The hidden states that models record for heads are those of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fakes import MarkovModel
from small_models import llama, randomised
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from flashspec.models.base import Features
from flashspec.models.checkpoint import StateDict, decoder_config, decoder_weights
from flashspec.models.decoder import Decoder
from flashspec.models.hf import HFModel
from flashspec.models.native import NativeModel, pack
from flashspec.models.reader import Reader

TEXTS = torch.randint(0, 320, (3, 20), generator=torch.Generator().manual_seed(1))
LENGTHS = torch.tensor([20, 7, 1])
LAYERS = (0, 2, 3, 5)  # of 5: what is embedded, two between, the final-normed


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def source(kind: str = "llama") -> PreTrainedModel:
    if kind == "llama":
        return llama(num_hidden_layers=5)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "vocab_size": 320}
    return randomised(Qwen3ForCausalLM(Qwen3Config(**sizes)))


def decoder(model: PreTrainedModel) -> Decoder:
    config, state = decoder_config(model.config.to_dict()), StateDict(model.state_dict())
    return Decoder(config, decoder_weights(config, state, torch.device("cpu"), torch.float32))


def native(model: PreTrainedModel) -> NativeModel:
    config, state = decoder_config(model.config.to_dict()), StateDict(model.state_dict())
    return NativeModel(config, state, pack(config, state))


def theirs(model: PreTrainedModel) -> Tensor:
    """(B, T, len(LAYERS) * hidden)"""
    states = model(TEXTS, output_hidden_states=True).hidden_states
    return torch.cat([states[layer] for layer in LAYERS], -1)


def assert_known(features: Features | None, expected: Tensor, lengths: Tensor) -> None:
    assert features is not None
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(features.buffer[row, :length], expected[row, :length], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("wrap", [decoder, native, HFModel])
def test_recorded_states_are_those_of_transformers(wrap: Any, kind: str) -> None:
    """A ragged batch, read in chunks; then a draft at the texts' ends, whose slots are read again by what follows."""
    model = source(kind)
    reader = Reader(wrap(model), 3, 24)
    reader.record(LAYERS, 20)
    reader.catch_up(TEXTS, LENGTHS, 20, chunk=6)
    expected = theirs(model)
    assert_known(reader.features, expected, LENGTHS - 1)
    draft = torch.full((3, 3), 9)
    reader.read(draft, LENGTHS[:, None] - 1 + torch.arange(3), 24)
    reader.rewind(LENGTHS)
    grown = torch.tensor([20, 12, 2])
    reader.stale = 5
    reader.catch_up(TEXTS, grown, 20, chunk=4)
    assert_known(reader.features, expected, grown - 1)


@pytest.mark.parametrize("wrap", [decoder, native, HFModel])
def test_recording_changes_no_result(wrap: Any) -> None:
    model = wrap(source())
    positions = torch.arange(20).repeat(3, 1)
    features = Features.empty(model, LAYERS, 3, 24)
    hidden = model.forward(TEXTS, positions, model.new_cache(3, 24), 20, features=features)
    torch.testing.assert_close(hidden, model.forward(TEXTS, positions, model.new_cache(3, 24), 20))
    torch.testing.assert_close(features.at((5,), positions), hidden)


def test_more_layers_are_recorded_when_asked_and_the_text_is_read_again() -> None:
    model = source()
    reader = Reader(decoder(model), 3, 24)
    reader.catch_up(TEXTS, LENGTHS, 20)
    for layers in ((3, 5), (0, 2, 3)):
        reader.record(layers, 20)
        assert reader.stale == 19
        reader.catch_up(TEXTS, LENGTHS, 20)
    reader.record((2, 5), 20)
    assert reader.stale == 0 and reader.features is not None and reader.features.layers == LAYERS
    assert_known(reader.features, theirs(model), LENGTHS - 1)
    reader.grow(40)
    assert reader.features.buffer.shape[1] == 40
    assert_known(reader.features, theirs(model), LENGTHS - 1)


def test_layers_in_any_order() -> None:
    model = MarkovModel.random(5, 1)
    features = Features.empty(model, (0, 1, 2), 2, 4)
    features.buffer.copy_(torch.arange(48.0).view(2, 4, 6))
    slots = torch.tensor([[1, 3], [0, 2]])
    assert features.at((2, 0), slots)[1, 1].tolist() == [40, 41, 36, 37]
    assert torch.equal(features.at((0, 1, 2), slots), features.at((0, 1, 2), slots)[:, :, :])
    features.record(7, slots, torch.zeros(2, 2, 2))  # not ours
    assert features.buffer.max() == 47


def test_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layers are \[3\]; the model has hidden states 0 to 2"):
        Features.empty(MarkovModel.random(5, 1), (3,), 1, 4)


def test_the_native_kernel_refuses_a_buffer_of_another_shape() -> None:
    model = native(source())
    features = Features((0, 5), torch.zeros(1, 8, 64))
    with pytest.raises(ValueError, match="features should be"):
        model.forward(TEXTS[:1, :4], torch.arange(4)[None], model.new_cache(1, 8), 8, features=features)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("wrap", [decoder, native, HFModel])
def test_vocabulary_weights_are_the_models(wrap: Any, tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    vocabulary = wrap(model).vocabulary()
    assert torch.equal(vocabulary.embedding, model.get_input_embeddings().weight)
    assert torch.equal(vocabulary.lm_head, model.get_output_embeddings().weight)
