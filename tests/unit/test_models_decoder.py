"""Both decoders against transformers' own modules, on small random models of every family."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flashspec.kernels import native_build
from flashspec.models.base import KVCache, LanguageModel
from flashspec.models.checkpoint import StateDict, UnsupportedModel, decoder_config, decoder_weights
from flashspec.models.decoder import Decoder
from flashspec.models.native import NativeModel, fits, pack

VOCAB, LENGTH, CAPACITY = 61, 18, 24
TOLERANCE = 1e-4
CPU = torch.device("cpu")

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def rope(rope_type: str, **parameters: float) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 5}

CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**SMALL),
    "llama-tied-llama3": lambda: tf.LlamaConfig(**SMALL, **LLAMA3, tie_word_embeddings=True),
    "llama-bias": lambda: tf.LlamaConfig(**SMALL, attention_bias=True),
    "llama-wide-heads": lambda: tf.LlamaConfig(**SMALL, head_dim=32),
    "llama-all-heads": lambda: tf.LlamaConfig(**{**SMALL, "num_key_value_heads": 4}),
    "llama-linear": lambda: tf.LlamaConfig(**SMALL, **rope("linear", factor=4.0)),
    "llama-dynamic": lambda: tf.LlamaConfig(**SMALL, **rope("dynamic", factor=4.0)),
    "llama-yarn": lambda: tf.LlamaConfig(**SMALL, **rope("yarn", **YARN)),
    "llama-yarn-mscale": lambda: tf.LlamaConfig(
        **SMALL, **rope("yarn", **YARN, mscale=1.2, mscale_all_dim=0.7, truncate=False, beta_fast=4.0)
    ),
    "smollm2": lambda: tf.LlamaConfig(
        **{**SMALL, "hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3}, tie_word_embeddings=True
    ),
    "mistral": lambda: tf.MistralConfig(**SMALL, sliding_window=5),
    "mistral-no-window": lambda: tf.MistralConfig(**SMALL, sliding_window=None),
    "qwen2": lambda: tf.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2-window": lambda: tf.Qwen2Config(**SMALL, **QWEN_WINDOW, max_window_layers=1),
    "qwen3": lambda: tf.Qwen3Config(**SMALL, head_dim=16, attention_bias=True),
    "qwen3-window": lambda: tf.Qwen3Config(**SMALL, head_dim=16, **QWEN_WINDOW, max_window_layers=0),
}
NAMES = list(CONFIGS)
BACKENDS = ["torch", "native"]


@cache
def reference(name: str) -> tf.PreTrainedModel:
    torch.manual_seed(NAMES.index(name))
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    for parameter in model.parameters():  # norms of 1 and biases of 0 would hide what is left out
        parameter.requires_grad_(False).add_(0.1 * torch.randn_like(parameter))
    return model


@cache
def decoder(name: str, backend: str) -> LanguageModel:
    model = reference(name)
    config, checkpoint = decoder_config(model.config.to_dict()), StateDict(model.state_dict())
    if backend == "torch":
        return Decoder(config, decoder_weights(config, checkpoint, CPU, torch.float32))
    if not native_build.available():
        pytest.skip(native_build.why_not())
    if not fits(config):
        pytest.skip("the native kernel knows one window for all layers")
    return NativeModel(config, checkpoint, pack(config, checkpoint))


def text(rows: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(rows))


def score(model: LanguageModel, ids: Tensor, start: int | Tensor, kv: KVCache, bound: int | None = None) -> Tensor:
    """Logits (B, Q, V) of ids (B, Q) standing from `start` (a number, or one a row) on."""
    starts = torch.as_tensor(start).expand(ids.shape[0])
    positions = starts[:, None] + torch.arange(ids.shape[1])
    return model.logits(model.forward(ids, positions, kv, bound or int(positions.max()) + 1))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_are_transformers_in_one_go_and_in_chunks(name: str, backend: str) -> None:
    model, ids = decoder(name, backend), text()
    theirs = reference(name)(ids).logits
    assert_close(score(model, ids, 0, model.new_cache(1, CAPACITY)), theirs)
    kv, at = model.new_cache(1, CAPACITY), 0
    for size in (7, 1, 5, 1, 4):
        ours = score(model, ids[:, at : at + size], at, kv, bound=None if size > 1 else CAPACITY)
        assert_close(ours, theirs[:, at : at + size])
        at += size
    assert at == LENGTH


@pytest.mark.parametrize("name", ["smollm2", "mistral", "qwen2-window", "qwen3"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_stand_at_their_own_positions_and_drafts_are_overwritten(name: str, backend: str) -> None:
    model, ids = decoder(name, backend), text(rows=3)
    theirs = reference(name)(ids).logits
    kv, starts = model.new_cache(3, CAPACITY), torch.tensor([2, 11, 7])
    score(model, ids[:, :11], 0, kv)
    score(model, (ids[:, :6] + 1) % VOCAB, starts, kv)  # a wrong draft in every row
    rows = torch.arange(3)[:, None]
    columns = starts[:, None] + torch.arange(6)
    assert_close(score(model, ids[rows, columns], starts, kv), theirs[rows, columns])


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_may_stay_at_the_last_slot(backend: str) -> None:
    model, ids = decoder("llama", backend), text()
    kv = model.new_cache(1, LENGTH)
    positions = torch.arange(LENGTH + 3).clamp(max=LENGTH - 1)[None]
    padded = torch.cat([ids, ids[:, -1:].expand(1, 3)], 1)
    ours = model.logits(model.forward(padded, positions, kv, LENGTH))
    assert_close(ours[:, :LENGTH], reference("llama")(ids).logits)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_early_exit_norms_the_state_after_that_layer(name: str, backend: str) -> None:
    model, ids = decoder(name, backend), text()
    hf = reference(name)
    layers = hf(ids, output_hidden_states=True).hidden_states  # hidden_states[k]: after k layers
    positions = torch.arange(LENGTH)[None]
    for count in (1, 2):
        ours = model.forward(ids, positions, model.new_cache(1, CAPACITY), LENGTH, num_layers=count)
        assert_close(ours, hf.model.norm(layers[count]))


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("llama")])
def test_rotary_frequencies_are_transformers(name: str) -> None:
    hf = reference(name)
    config = decoder_config(hf.config.to_dict())
    assert config.inv_freq == pytest.approx(hf.model.rotary_emb.inv_freq.tolist(), rel=1e-6)
    assert config.rotary_scale == pytest.approx(hf.model.rotary_emb.attention_scaling)


def test_a_scaling_stretches_the_whole_context_where_nothing_else_is_said() -> None:
    raw = CONFIGS["llama-tied-llama3"]().to_dict()
    silent = {field: value for field, value in LLAMA3["rope_parameters"].items() if not field.startswith("original")}
    said = silent | {"original_max_position_embeddings": SMALL["max_position_embeddings"]}
    assert decoder_config(raw | {"rope_parameters": silent}) == decoder_config(raw | {"rope_parameters": said})
    old = {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": {**said, "type": "llama3"}}
    assert decoder_config(raw | old) == decoder_config(raw | {"rope_parameters": said})


def test_a_forward_reads_nothing_back() -> None:
    model = decoder("qwen3-window", "torch")
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        kv = KVCache(*(fake.from_tensor(torch.zeros(3, 2, 2, CAPACITY, 16)) for _ in range(2)))
        ids, positions = (fake.from_tensor(torch.zeros(2, 5, dtype=torch.int64)) for _ in range(2))
        logits = model.logits(model.forward(ids, positions, kv, CAPACITY))
    assert logits.shape == (2, 5, VOCAB) and logits.dtype == torch.float32


def test_sixteen_bit_weights_compute_in_their_dtype() -> None:
    hf = reference("llama")
    config = decoder_config(hf.config.to_dict())
    model = Decoder(config, decoder_weights(config, StateDict(hf.state_dict()), CPU, torch.bfloat16))
    kv = model.new_cache(1, CAPACITY)
    assert kv.keys.dtype == model.dtype == torch.bfloat16
    ours, theirs = score(model, text(), 0, kv), hf(text()).logits
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().mean() < 0.05 * theirs.std()


def test_tied_embeddings_are_one_tensor() -> None:
    tied, untied = decoder("smollm2", "torch"), decoder("llama", "torch")
    assert tied.weights.lm_head is tied.weights.embedding
    assert untied.weights.lm_head is not untied.weights.embedding


def test_a_native_token_out_of_range_is_refused() -> None:
    model = decoder("llama", "native")
    with pytest.raises(ValueError, match="token_ids"):
        score(model, torch.tensor([[VOCAB]]), 0, model.new_cache(1, 4))


def test_a_config_without_layer_types_slides_from_max_window_layers_on() -> None:
    raw = CONFIGS["qwen2-window"]().to_dict()
    del raw["layer_types"]
    assert decoder_config(raw).windows == (None, 5, 5)
    assert decoder_config(raw | {"use_sliding_window": False}).windows == (None,) * 3


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5, "rope_parameters": None}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type"),
    ],
)
def test_what_the_decoder_has_no_code_for_is_named(change: dict, field: str) -> None:
    with pytest.raises(UnsupportedModel, match=field):
        decoder_config(CONFIGS["llama"]().to_dict() | change)
