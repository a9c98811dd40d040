"""What tells models and their revisions apart: the same of the same weights whatever holds them, and of no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from small_models import llama, randomised, write_gguf
from torch import nn
from transformers import PreTrainedModel

from flashspec.drafters.heads import target_hash
from flashspec.models.base import CORNER, FIRST_ROWS, SharesVocabulary
from flashspec.models.checkpoint import StateDict, decoder_config, decoder_weights
from flashspec.models.decoder import Decoder
from flashspec.models.gguf import GgufFile
from flashspec.models.hf import HFModel
from flashspec.models.native import NativeModel, pack

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def decoder(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> Decoder:
    config, state = decoder_config(model.config.to_dict()), StateDict(model.state_dict())
    return Decoder(config, decoder_weights(config, state, torch.device("cpu"), dtype))


def native(model: PreTrainedModel) -> NativeModel:
    config, state = decoder_config(model.config.to_dict()), StateDict(model.state_dict())
    return NativeModel(config, state, pack(config, state))


def wide() -> PreTrainedModel:
    """Matrices that are larger than their corners, and one that is narrower."""
    return llama(hidden_size=192, num_hidden_layers=3, num_attention_heads=12, num_key_value_heads=4)


@pytest.mark.parametrize("wrap", [decoder, native, HFModel])
def test_a_sample_is_corners_of_the_layers_own_matrices(wrap: Any) -> None:
    model = wide()
    sample = wrap(model).sample()
    embedding, norm = model.model.embed_tokens.weight, model.model.norm.weight
    assert torch.equal(sample.outer, torch.cat([norm, embedding[:FIRST_ROWS].flatten()]))
    rows, columns = CORNER
    linear = [x.weight for x in model.model.layers.modules() if isinstance(x, nn.Linear)]
    assert len(linear) == 3 * len(MATRICES)
    assert torch.equal(sample.layers, torch.cat([x[:rows, :columns].flatten() for x in linear]))


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("wrap", [decoder, native, HFModel])
def test_a_merged_lora_of_one_matrix_is_another_revision(wrap: Any, matrix: str) -> None:
    changed = wide()
    weight = next(
        w
        for name, w in changed.named_parameters()
        if f"layers.1.{matrix}" in name.replace("self_attn.", "").replace("mlp.", "")
    )
    left, right = torch.randn(len(weight), 1), torch.randn(1, weight.shape[1])
    weight += 1e-3 * left @ right
    before, after = (target_hash(wrap(model).sample()).split("-") for model in (wide(), changed))
    assert before[0] == after[0] and before[1] != after[1]


def test_another_embedding_or_norm_is_another_model() -> None:
    first = target_hash(decoder(wide()).sample()).split("-")
    for name in ("embed_tokens", "norm"):
        changed = wide()
        changed.model.get_submodule(name).weight[0] += 0.1
        other = target_hash(decoder(changed).sample()).split("-")
        assert other[0] != first[0] and other[1] == first[1]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "BF16", "F16", "F32"])
def test_packed_blocks_are_what_they_unpack_to(tmp_path: Path, kind: str) -> None:
    model = wide()
    model.model.layers[0].self_attn.q_proj.weight[3, :32] *= -1  # scales of either sign, and zeros among the values
    model.model.layers[0].self_attn.q_proj.weight[3, 5] = 0
    file = GgufFile(write_gguf(tmp_path / "small.gguf", model, kind))
    config, place = decoder_config(file.config), torch.device("cpu")
    holders: list[SharesVocabulary] = [NativeModel(config, file, pack(config, file))]
    holders += [Decoder(config, decoder_weights(config, file, place, t)) for t in (torch.float32, torch.bfloat16)]
    assert len({target_hash(model.sample()) for model in holders}) == 1
    half = Decoder(config, decoder_weights(config, file, place, torch.float16))
    names = {target_hash(model.sample(), torch.float16) for model in (*holders[:2], half)}
    assert len(names) == 1


def test_models_that_learn_no_norm_or_no_linear_head_have_a_sample() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    olmo = randomised(tf.OlmoForCausalLM(tf.OlmoConfig(**sizes, vocab_size=320, max_position_embeddings=64)))
    gpt = randomised(tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=320, n_positions=64)))
    for model in (olmo, gpt):
        before = target_hash(HFModel(model).sample())
        next(p for name, p in model.named_parameters() if ".1." in name and p.dim() == 2)[0] += 0.1
        assert target_hash(HFModel(model).sample()) != before
