"""A trained drafter's folder: weights and config in the layout of public heads, and a model card."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import flashspec
from flashspec.models.checkpoint import decoder_config
from flashspec.training.files import write_json, write_tensors, write_whole
from flashspec.training.heads import DraftHead, Eagle3Head, HeadShape, MedusaHeads, TinyModel
from flashspec.training.measure import Measure
from flashspec.training.settings import Kind, Settings
from flashspec.training.target import Target
from flashspec.training.vocabulary import DraftVocabulary

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings")
_ARCHITECTURES = {Kind.EAGLE3: "LlamaForCausalLMEagle3", Kind.MEDUSA: "MedusaModel", Kind.TINY: "LlamaForCausalLM"}


def head_config(target: Target, settings: Settings, draft_vocab: int, feature_layers: Sequence[int]) -> dict[str, Any]:
    """The contents of the drafter's config.json."""
    c, kind = target.decoder.config, settings.kind
    own = {
        Kind.EAGLE3: {"target_hidden_size": c.hidden_size},
        Kind.MEDUSA: {"medusa_num_heads": settings.unroll, "medusa_num_layers": settings.layers},
        Kind.TINY: {},
    }[kind]
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "intermediate_size": settings.intermediate_size or c.intermediate_size,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.norm_eps,
        **{name: target.loaded.config[name] for name in _ROPE if target.loaded.config.get(name) is not None},
        "vocab_size": c.vocab_size,
        "draft_vocab_size": draft_vocab,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        **own,
        "flashspec": {
            "kind": kind.value,
            "target": target.loaded.name,
            "revision": target.revision,
            "target_hash": target.hash(),
            "target_hash_float16": target.float16_hash(),
            "target_likeness": target.likeness(),
            "feature_layers": list(feature_layers),
            "shares_lm_head": settings.shares_lm_head or kind is Kind.TINY,
        },
    }


def build_head(
    config: Mapping[str, Any], target: Target, vocabulary: DraftVocabulary, scales: Sequence[float], seed: int
) -> DraftHead:
    """The drafter of a config, as it is before any training: what the target knows already is copied. scales: as
    `feature_scales` gives them."""
    c, marks = decoder_config(config), config["flashspec"]
    weights, size = target.decoder.weights, config["hidden_size"]
    shape = HeadShape(c, len(vocabulary), len(marks["feature_layers"]), config.get("medusa_num_heads", 0))
    rows = weights.lm_head[vocabulary.ids].float()
    shared = rows if marks["shares_lm_head"] else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head: DraftHead
        match marks["kind"]:
            case Kind.EAGLE3:
                head = Eagle3Head(shape, shared, scales[: shape.num_features])
            case Kind.MEDUSA:
                head = MedusaHeads(shape, shared, None if shared is None else scales)
            case _:
                head = TinyModel(shape, rows)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if re.fullmatch(r"lm_head\.weight|\d+\.\d+\.weight", name):
                parameter.copy_(rows)
            elif name in ("norm.weight", "model.norm.weight"):  # SmolLM2: a loss of 6.4 at first, and 13.7 unshrunk
                parameter.copy_(0.3 * weights.final_norm)
            elif name == "fc.weight" and isinstance(head, Eagle3Head):  # the fused feature begins as the highest one
                parameter[:, -size:] += torch.eye(size)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):  # what is random says little at first
                parameter.mul_(1 / math.sqrt(2 * config["num_hidden_layers"]))
    return head.to(target.decoder.device)


def _reads(marks: Mapping[str, Any]) -> str:
    """What a drafter is told of the text."""
    layers = ", ".join(map(str, marks["feature_layers"]))
    if marks["kind"] == Kind.TINY:
        return "the text"
    if marks["kind"] == Kind.EAGLE3:
        return f"the text, and the target's hidden states after layers {layers}"
    if marks["shares_lm_head"]:
        return f"the target's hidden states after layers {layers} and its final ones, and the token behind them"
    return "the target's final hidden states"


def write_checkpoint(
    folder: Path, head: DraftHead, vocabulary: DraftVocabulary, config: Mapping[str, Any], card: str
) -> None:
    """Weights last: a folder without them is no drafter, and one with them has all the rest."""
    write_json(folder / CONFIG, config)
    write_whole(folder / CARD, card.encode())
    tensors = {name: tensor.bfloat16() for name, tensor in head.public_state().items()}
    write_tensors(folder / WEIGHTS, {**tensors, "d2t": vocabulary.d2t, "t2d": vocabulary.t2d})


def parameters_of(head: DraftHead) -> int:
    return sum(parameter.numel() for parameter in head.parameters())


def model_card(
    target: Target,
    settings: Settings,
    config: Mapping[str, Any],
    data: str,
    measures: Sequence[Measure],
    parameters: int,
) -> str:
    marks = config["flashspec"]
    licence = target.licence or "not stated in its files: see the target's own card"
    lines = [
        f"# A drafter for {target.loaded.name}",
        "",
        f"Kind `{marks['kind']}`, {parameters:,} parameters, trained with FlashSpec {flashspec.__version__} on text",
        "that the target wrote itself. It proposes tokens; the target checks each of them, so the text stays its own.",
        "",
        f"- Target: {target.loaded.name}, revision {target.revision or 'unknown'}, weights {marks['target_hash']}",
        f"- Licence of the target, of whose text and weights this is made: {licence}",
        f"- Data: {data}",
        f"- Reads: {_reads(marks)}",
        f"- Draft vocabulary: {config['draft_vocab_size']:,} of {config['vocab_size']:,} tokens",
        f"- Seed {settings.seed}, {settings.seconds / 60:g} minutes in all on {target.decoder.device.type}",
        "",
        f"Held-out text of the target, greedy, chains of {settings.gamma} draft tokens:",
        "",
        "| seconds | tokens seen | loss | tokens a step | accepted by position |",
        "|---:|---:|---:|---:|---|",
    ]
    for m in measures:
        rates = " ".join(f"{rate:.2f}" for rate in m.acceptance)
        lines.append(f"| {m.seconds:.0f} | {m.tokens:,} | {m.loss:.3f} | {m.length:.2f} | {rates} |")
    return "\n".join(lines) + "\n"
