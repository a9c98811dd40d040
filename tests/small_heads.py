"""Small random heads on disk, in the layouts of public checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 40, 64, 96, 7, 4, 2, 16
PART = sorted({*range(0, 40, 3), *range(5, 20)})  # the tokens of a trimmed vocabulary


def write_eagle(folder: Path, part: Sequence[int] | None = PART, seed: int = 5, **changes: Any) -> Path:
    """changes: of config.json; part None: a head that scores every token, by the target's LM head."""
    size = VOCAB if part is None else len(part)
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (HIDDEN, 3 * HIDDEN), **_layer("midlayer", 2)}
    shapes |= {"midlayer.hidden_norm.weight": (HIDDEN,), "norm.weight": (HIDDEN,)}
    tensors = _random(shapes if part is None else {**shapes, "lm_head.weight": (size, HIDDEN)}, seed)
    config = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": size, **_SIZES, "num_hidden_layers": 1}
    return write(folder, {**tensors, **_map(part)}, {**config, "max_position_embeddings": 32, **changes})


def write_medusa(
    folder: Path,
    count: int = 4,
    depth: int = 2,
    seed: int = 6,
    own: bool = True,
    part: Sequence[int] | None = None,
    beside: bool = False,
    **changes: Any,
) -> Path:
    """beside: heads that read lower layers and the last token too."""
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (HIDDEN, 5 * HIDDEN)} if beside else {}
    for head in range(count):
        for block in range(depth):
            shapes[f"{head}.{block}.linear.weight"] = (HIDDEN, HIDDEN)
            shapes[f"{head}.{block}.linear.bias"] = (HIDDEN,)
        if own:
            shapes[f"{head}.{depth}.weight"] = (VOCAB if part is None else len(part), HIDDEN)
    config = {"medusa_num_heads": count, "medusa_num_layers": depth, "base_model_name_or_path": "target"}
    tensors = {**_random(shapes, seed), **_map(part)}
    return write(folder, tensors, {**config, **changes}, "medusa_lm_head.safetensors")


def write_tiny(folder: Path, part: Sequence[int] | None = None, seed: int = 7, **changes: Any) -> Path:
    shapes = {**_layer("model.layers.0", 1), **_layer("model.layers.1", 1), "model.norm.weight": (HIDDEN,)}
    config = {**_SIZES, "num_hidden_layers": 2, "max_position_embeddings": 64, "flashspec": {"kind": "tiny"}}
    return write(folder, {**_random(shapes, seed), **_map(part)}, {**config, **changes})


_SIZES = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


def _layer(prefix: str, inputs: int) -> dict[str, tuple[int, ...]]:
    wide, narrow = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    return {
        f"{prefix}.input_layernorm.weight": (HIDDEN,),
        f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
        f"{prefix}.self_attn.q_proj.weight": (wide, inputs * HIDDEN),
        f"{prefix}.self_attn.k_proj.weight": (narrow, inputs * HIDDEN),
        f"{prefix}.self_attn.v_proj.weight": (narrow, inputs * HIDDEN),
        f"{prefix}.self_attn.o_proj.weight": (HIDDEN, wide),
        f"{prefix}.mlp.gate_proj.weight": (INNER, HIDDEN),
        f"{prefix}.mlp.up_proj.weight": (INNER, HIDDEN),
        f"{prefix}.mlp.down_proj.weight": (HIDDEN, INNER),
    }


def _random(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """What bfloat16 can hold; norms are around 1, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 0.2 + name.endswith("norm.weight")).bfloat16().float()
        for name, shape in shapes.items()
    }


def _map(part: Sequence[int] | None) -> dict[str, Tensor]:
    if part is None:
        return {}
    token_ids, known = torch.tensor(part), torch.zeros(VOCAB, dtype=torch.bool)
    known[token_ids] = True
    return {"d2t": token_ids - torch.arange(len(part)), "t2d": known}


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], file: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / file)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
