"""Small models and tokenizers on disk, in the formats that loading reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
import transformers as tf
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from flashspec.models.decoder import Decoder, DecoderConfig, DecoderWeights, LayerWeights

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}\n{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = ["the quick brown fox jumps over the lazy dog", "what is in a name? the rose, by any other name", "12 345 678"]


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's kind: every byte is a token, a few merges, three special tokens with the ids 0, 1, 2."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """Llama 2's kind: words begin with '▁', unknown characters fall apart into byte tokens."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefgh", "▁a", "▁b"]
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = [("▁", "a"), ("▁", "b")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def wrapped(backend: tokenizers.Tokenizer) -> tf.PreTrainedTokenizerFast:
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def llama(vocab_size: int = 320, **changes: object) -> tf.LlamaForCausalLM:
    config = tf.LlamaConfig(
        **{
            "vocab_size": vocab_size,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **changes,
        }
    )
    return randomised(tf.LlamaForCausalLM(config))


def randomised(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    """The same weights every time; norms and biases are around 1, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.requires_grad_(False).copy_(noise + (parameter.dim() == 1))
    return model.eval()


def write_gguf(path: Path, model: tf.PreTrainedModel, kind: str = "F32", factors: list[float] | None = None) -> Path:
    """A llama or qwen2 model as llama.cpp's converter would write it; matrices in `kind`, the embedding in Q8_0."""
    config, architecture = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    _write_tokenizer(writer)
    if factors:
        writer.add_tensor("rope_freqs.weight", np.array(factors, dtype=np.float32))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if architecture == "llama" and heads:  # the converter puts the halves of a rotary pair side by side
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        stored = "F32" if tensor.dim() == 1 else "Q8_0" if "embed" in name else kind
        quantised = gguf.GGMLQuantizationType[stored]
        data = gguf.quants.quantize(np.ascontiguousarray(values), quantised)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_tokenizer(writer: gguf.GGUFWriter) -> None:
    backend = byte_level()
    vocabulary = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in SPECIAL else 1 for token, _ in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)


def decoder_of(c: DecoderConfig, normal: Callable[..., Tensor]) -> Decoder:
    """A decoder of any shape whose weights come from normal(*size); norms are around 1."""
    width = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    layers = tuple(
        LayerWeights(
            attention_norm=1 + normal(c.hidden_size),
            qkv=normal(width, c.hidden_size),
            output=normal(c.hidden_size, c.num_heads * c.head_dim),
            mlp_norm=1 + normal(c.hidden_size),
            gate_up=normal(2 * c.intermediate_size, c.hidden_size),
            down=normal(c.hidden_size, c.intermediate_size),
            qkv_bias=normal(width) if c.qkv_bias else None,
            output_bias=normal(c.hidden_size) if c.output_bias else None,
            qk_norm=1 + normal(c.num_heads + c.num_kv_heads, c.head_dim) if c.qk_norm else None,
        )
        for _ in c.windows
    )
    embedding = normal(c.vocab_size, c.hidden_size)
    return Decoder(c, DecoderWeights(embedding, layers, 1 + normal(c.hidden_size), normal(c.vocab_size, c.hidden_size)))
