"""The adapter's logits are the model's own, wherever the tokens are cut, written again or stand in the batch."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from flashspec.core import FlashSpecError
from flashspec.models.base import KVCache, LanguageModel
from flashspec.models.hf import HFModel

VOCAB = 61
LENGTH = 14  # longer than the window of 5, so that a mask without it shows

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
SMALL_GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS = {
    "gpt2": lambda: tf.GPT2Config(vocab_size=VOCAB, pad_token_id=5, **SMALL_GPT),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**SMALL),
    "gemma": lambda: tf.GemmaConfig(**GROUPED),
    "gemma2": lambda: tf.Gemma2Config(
        **GROUPED,
        sliding_window=5,
        layer_types=LAYERS,
        query_pre_attn_scalar=4,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=2.0,
    ),
    "gemma3": lambda: tf.Gemma3TextConfig(**GROUPED, sliding_window=5, layer_types=LAYERS),
    "llama": lambda: tf.LlamaConfig(**GROUPED),
    "mistral": lambda: tf.MistralConfig(**GROUPED, sliding_window=5),
    "mixtral": lambda: tf.MixtralConfig(**GROUPED, num_local_experts=4, sliding_window=None),
    "opt": lambda: tf.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32),
    "phi": lambda: tf.PhiConfig(**SMALL),
    "cohere": lambda: tf.CohereConfig(**GROUPED, logit_scale=0.25),
    "granite": lambda: tf.GraniteConfig(**GROUPED, logits_scaling=3.0),
    "gpt_oss": lambda: tf.GptOssConfig(**GROUPED, num_local_experts=4, sliding_window=5, layer_types=LAYERS),
}
NAMES = list(CONFIGS)


def build(config: tf.PreTrainedConfig) -> tf.PreTrainedModel:
    torch.manual_seed(3)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@cache
def pair(name: str) -> tuple[tf.PreTrainedModel, HFModel]:
    model = build(CONFIGS[name]())
    return model, HFModel(model)


def texts(rows: int, length: int = LENGTH, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


def own_logits(model: tf.PreTrainedModel, token_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(token_ids, use_cache=False).logits.float()


def score(lm: LanguageModel, token_ids: Tensor, starts: list[int], kv: KVCache) -> Tensor:
    """Logits of token_ids (B, Q) whose row b begins at position starts[b]."""
    positions = torch.tensor(starts)[:, None] + torch.arange(token_ids.shape[1])
    bound = int(positions.max()) + 1
    return lm.logits(lm.forward(token_ids, positions, kv, bound))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunks", [[LENGTH], [1, 6, 4, 3], [1] * LENGTH], ids=["whole", "chunks", "singles"])
def test_logits_are_the_models_own_however_the_text_is_cut(name: str, chunks: list[int]) -> None:
    model, lm = pair(name)
    token_ids = texts(2)
    kv = lm.new_cache(2, 20)
    kv.keys.fill_(7.0)  # what an unwritten slot holds must not show
    kv.values.fill_(7.0)
    starts = [sum(chunks[:i]) for i in range(len(chunks))]
    pieces = [score(lm, token_ids[:, s : s + n], [s, s], kv) for s, n in zip(starts, chunks, strict=True)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), own_logits(model, token_ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_rows_stand_apart_and_slots_are_rewritten(name: str) -> None:
    """Rows at positions 9 and 4 write wrong draft tokens first, then the right ones over them."""
    model, lm = pair(name)
    token_ids = texts(2)
    kv = lm.new_cache(2, 20)
    score(lm, token_ids[:, :9], [0, 0], kv)
    score(lm, texts(2, 5, seed=1), [9, 4], kv)
    right = torch.stack([token_ids[0, 9:14], token_ids[1, 4:9]])
    logits = score(lm, right, [9, 4], kv)
    expected = own_logits(model, token_ids)
    expected = torch.stack([expected[0, 9:14], expected[1, 4:9]])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "llama"])
def test_a_row_held_at_the_last_slot_harms_nothing(name: str) -> None:
    model, lm = pair(name)
    capacity = LENGTH
    token_ids = texts(2)
    kv = lm.new_cache(2, capacity)
    score(lm, token_ids, [0, 0], kv)
    before = kv.keys.clone()
    positions = torch.tensor([[12, 13, 13, 13], [2, 3, 4, 5]])  # row 0 has reached its limit
    step = torch.cat([texts(1, 4, seed=2), token_ids[1:, 2:6]])
    logits = lm.logits(lm.forward(step, positions, kv, capacity))
    torch.testing.assert_close(logits[1], own_logits(model, token_ids)[1, 2:6], atol=1e-4, rtol=0)
    assert torch.equal(kv.keys[:, 0, :, :12], before[:, 0, :, :12])
    assert logits.isfinite().all()


def decode_with_wrong_drafts(lm: HFModel, prompt: Tensor, new_tokens: int) -> Tensor:
    """Greedy decoding that drafts three tokens a step, of which the first is right and the third never is."""
    kv = lm.new_cache(1, prompt.shape[1] + new_tokens + 4)
    text = prompt
    next_id = score(lm, text, [0], kv)[:, -1:].argmax(-1)
    while text.shape[1] - prompt.shape[1] < new_tokens:
        text = torch.cat([text, next_id], dim=1)
        start = text.shape[1] - 1
        first = score(lm, next_id, [start], kv).argmax(-1)  # the draft that will be accepted
        draft = torch.cat([next_id, first, (first + 1) % VOCAB, (first + 2) % VOCAB], dim=1)
        choice = score(lm, draft, [start], kv).argmax(-1)
        num_accepted = int((draft[:, 1:] == choice[:, :-1]).cumprod(-1).sum())
        text = torch.cat([text, draft[:, 1 : 1 + num_accepted]], dim=1)
        next_id = choice[:, num_accepted : num_accepted + 1]
    return text[:, : prompt.shape[1] + new_tokens]


@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_is_that_of_generate(name: str) -> None:
    model, lm = pair(name)
    prompt = texts(1, 5)
    settings = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "eos_token_id": None}
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    assert torch.equal(decode_with_wrong_drafts(lm, prompt, 12), expected)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "mixtral"])
def test_the_callers_model_stays_as_it_was(name: str) -> None:
    model = build(CONFIGS[name]()).train()
    config = copy.deepcopy(model.config.to_dict())
    implementation = model.config._attn_implementation
    modules, prompt = list(model.modules()), texts(1, 6)
    mask = torch.ones_like(prompt)
    before = model.eval().generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=8)
    model.train()

    lm = HFModel(model)
    kv = lm.new_cache(1, 10)
    score(lm, prompt, [0], kv)
    lm.forward(prompt, torch.arange(6)[None], kv, 6, num_layers=1)

    assert model.training and all(module.training for module in modules)
    assert model.config.to_dict() == config and model.config._attn_implementation == implementation
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))
    after = model.eval().generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=8)
    assert torch.equal(after, before)


def test_weights_are_shared_and_dropout_is_off() -> None:
    config = CONFIGS["gpt2"]()
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.5
    model = build(config).train()
    lm = HFModel(model)
    token_ids = texts(1)
    first = score(lm, token_ids, [0], lm.new_cache(1, LENGTH))
    assert torch.equal(score(lm, token_ids, [0], lm.new_cache(1, LENGTH)), first)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)  # tied to the embedding, so both ends change
    changed = score(lm, token_ids, [0], lm.new_cache(1, LENGTH))
    torch.testing.assert_close(changed, own_logits(model.eval(), token_ids), atol=1e-3, rtol=0)
    assert not torch.allclose(changed, first)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "gemma3"])
def test_early_exit_is_the_model_without_its_later_layers(name: str) -> None:
    model, lm = pair(name)
    short = copy.deepcopy(model)
    stack = next(m for m in short.get_decoder().children() if isinstance(m, torch.nn.ModuleList))
    del stack[2:]
    token_ids = texts(2)
    positions = torch.arange(LENGTH).expand(2, -1)
    kv = lm.new_cache(2, LENGTH)
    hidden = lm.forward(token_ids, positions, kv, LENGTH, num_layers=2)
    torch.testing.assert_close(lm.logits(hidden), own_logits(short, token_ids), atol=1e-4, rtol=0)
    assert kv.keys[:2].any() and not kv.keys[2].any()
    full = lm.logits(lm.forward(token_ids, positions, kv, LENGTH, num_layers=3))
    torch.testing.assert_close(full, own_logits(model, token_ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("count", [0, 4])
def test_early_exit_refuses_layers_that_are_not_there(count: int) -> None:
    _, lm = pair("llama")
    with pytest.raises(FlashSpecError, match=rf"num_layers is {count}; LlamaForCausalLM has 1 to 3"):
        lm.forward(texts(1, 2), torch.arange(2)[None], lm.new_cache(1, 2), 2, num_layers=count)


def test_early_exit_refuses_a_model_whose_layers_it_cannot_find() -> None:
    lm = HFModel(build(tf.BertConfig(**SMALL, is_decoder=True)))
    with pytest.raises(FlashSpecError, match="not one list"):
        lm.forward(texts(1, 2), torch.arange(2)[None], lm.new_cache(1, 2), 2, num_layers=1)


def rope_scaled(kind: str) -> tf.PreTrainedConfig:
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "dynamic":
        return tf.LlamaConfig(**GROUPED, rope_parameters=rope)
    rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    sizes = {**SMALL, "num_key_value_heads": 2, "original_max_position_embeddings": 16}
    return tf.Phi3Config(**sizes, rope_parameters=rope)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_changes_with_length_is_used_where_it_does_not(kind: str) -> None:
    model = build(rope_scaled(kind))
    own_logits(model, texts(1, 40))  # leaves long-rope's long frequencies in the model
    lm = HFModel(model)
    assert lm.max_context == {"dynamic": 64, "longrope": 16}[kind]
    token_ids = texts(1)
    kv = lm.new_cache(1, LENGTH)
    own_logits(model, texts(1, 40))
    logits = torch.cat([score(lm, token_ids[:, i : i + 1], [i], kv) for i in range(LENGTH)], dim=1)
    torch.testing.assert_close(logits, own_logits(model, token_ids), atol=1e-4, rtol=0)


class NoReadBack(TorchDispatchMode):
    """Raises where a value, or a shape that depends on one, is asked for; FakeTensorMode alone hides some."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


# The experts of Mixtral and gpt-oss count their tokens on the host, in their own code.
@pytest.mark.parametrize("name", [*(n for n in NAMES if n not in ("mixtral", "gpt_oss")), "dynamic", "longrope"])
def test_a_call_reads_nothing_back(name: str) -> None:
    lm = pair(name)[1] if name in CONFIGS else HFModel(build(rope_scaled(name)))
    kv = lm.new_cache(2, 12)
    token_ids, positions = texts(2, 3), torch.arange(3).repeat(2, 1)
    with NoReadBack():
        logits = lm.logits(lm.forward(token_ids, positions, kv, 12))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = KVCache(mode.from_tensor(kv.keys), mode.from_tensor(kv.values))
        hidden = lm.forward(mode.from_tensor(token_ids), mode.from_tensor(positions), fake, 12)
        assert lm.logits(hidden).shape == logits.shape == (2, 3, VOCAB)


def test_threads_do_not_see_each_other() -> None:
    model, lm = pair("gemma2")
    expected = own_logits(model, texts(4))

    def one_row(row: int) -> Tensor:
        kv = lm.new_cache(1, LENGTH)
        return torch.cat([score(lm, texts(4)[row : row + 1, i : i + 1], [i], kv) for i in range(LENGTH)], dim=1)

    with ThreadPoolExecutor(4) as pool:
        logits = torch.cat(list(pool.map(one_row, range(4))))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_what_it_says_of_itself() -> None:
    model = build(CONFIGS["gpt2"]())
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    lm: LanguageModel = HFModel(model)
    assert (lm.vocab_size, lm.max_context, lm.num_layers) == (VOCAB + 3, 64, 3)
    assert (lm.device, lm.dtype) == (torch.device("cpu"), torch.float32)
    _, grouped = pair("llama")
    kv = grouped.new_cache(5, 9)
    assert kv.keys.shape == kv.values.shape == (3, 5, 2, 9, 8) and kv.capacity == 9
    assert grouped.logits(torch.zeros(2, 32)).shape == (2, VOCAB)
    assert grouped.logits(torch.zeros(2, 3, 4, 32)).shape == (2, 3, 4, VOCAB)


def test_half_precision() -> None:
    model = build(CONFIGS["gemma2"]()).to(torch.bfloat16)
    lm = HFModel(model)
    logits = score(lm, texts(2), [0, 0], kv := lm.new_cache(2, LENGTH))
    assert kv.keys.dtype == lm.dtype == torch.bfloat16 and logits.dtype == torch.float32
    torch.testing.assert_close(logits, own_logits(model, texts(2)), atol=0.1, rtol=0)


def test_the_text_part_of_a_multimodal_model() -> None:
    text = CONFIGS["gemma3"]()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=3)
    torch.manual_seed(0)
    model = tf.Gemma3ForConditionalGeneration(config).eval()
    lm = HFModel(model)
    token_ids = texts(1)
    token_ids[token_ids == 3] = 4  # 3 stands for an image
    torch.testing.assert_close(
        score(lm, token_ids, [0], lm.new_cache(1, LENGTH)), own_logits(model, token_ids), atol=1e-4, rtol=0
    )


REFUSED = {
    "encoder-decoder": (
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16)),
        "no decoder apart from",
    ),
    "no interface": (
        lambda: build(tf.GPTJConfig(vocab_size=VOCAB, rotary_dim=4, **SMALL_GPT)),
        "AttentionInterface",
    ),
    "state space": (
        lambda: build(tf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)),
        "max_position_embeddings is None",
    ),
    "hybrid": (
        lambda: build(tf.JambaConfig(**GROUPED, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False)),
        "a trial run failed, as where layers keep other state",
    ),
    "latent attention": (
        lambda: build(
            tf.DeepseekV2Config(
                **SMALL,
                q_lora_rank=8,
                kv_lora_rank=16,
                qk_nope_head_dim=8,
                qk_rope_head_dim=8,
                v_head_dim=8,
                n_routed_experts=4,
                n_group=1,
                topk_group=1,
                moe_intermediate_size=16,
                first_k_dense_replace=3,
            )
        ),
        "keys and values differ in kind",
    ),
    "positions of its own": (
        lambda: build(tf.RobertaConfig(**SMALL, is_decoder=True)),
        "standard deviations off",
    ),
    "mask of its own": (lambda: build(tf.DogeConfig(**SMALL)), "DogeAttention attends by a mask of its own"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_architectures_are_refused_in_one_sentence(case: str) -> None:
    make, reason = REFUSED[case]
    with pytest.raises(FlashSpecError, match=reason) as caught:
        HFModel(make())
    assert "\n" not in str(caught.value)


def test_layers_without_a_cache_of_their_own_are_refused() -> None:
    model = build(CONFIGS["llama"]())
    model.get_decoder().layers[1].self_attn.layer_idx = 0  # as where a layer shares another's keys
    with pytest.raises(FlashSpecError, match=r"of its 3 layers only \[0, 2\] keep keys and values"):
        HFModel(model)
