"""Drafter heads from a folder: public EAGLE-3 and Medusa checkpoints, and what `flashspec train-drafter` writes.

A folder holds config.json and safetensors. Ours carry, in config.json, "flashspec": {"kind": "eagle3", "medusa" or
"tiny", "target" and "revision": their names, "target_hash" and "target_hash_float16": `target_hash` of its sample in
bfloat16 and in float16, or null, "target_likeness": `likeness` of it, "feature_layers": the layers, from 0, whose
outputs an EAGLE-3 head reads, or null}.
What is missing among embed_tokens, lm_head and Medusa's last layers is the target's own.
"""

from __future__ import annotations

import hashlib
import warnings
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashspec.core import FlashSpecError
from flashspec.drafters.base import Drafter
from flashspec.drafters.eagle import EagleDrafter, EagleHead, Fusion
from flashspec.drafters.medusa import Beside, MedusaDrafter, MedusaHeads, product_by
from flashspec.drafters.model import ModelDrafter
from flashspec.models.base import LanguageModel, Sample, SharesVocabulary
from flashspec.models.checkpoint import SafetensorsFolder, Weights, decoder_config, kind_of_head, read_json
from flashspec.models.decoder import Decoder, DecoderConfig, DecoderWeights

KINDS = ("eagle3", "medusa", "tiny")
MEDUSA_FILE = "medusa_lm_head.safetensors"
OTHER_FORMS = (  # of the EAGLE-3 layer
    "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "return_hidden_post_norm",
    "eh_proj_before_attn",
)  # fmt: skip
LIKENESS, ALIKE = 64, 0.5  # entries of an embedding; the least correlation, which others have by a chance of 1e-4


def eagle_layers(num_layers: int) -> tuple[int, int, int]:
    """The hidden states that public heads read: those entering layers 2, n / 2 and n - 3, or the nearest there are."""
    low, middle, high = (min(max(layer, 1), num_layers - 1) for layer in (2, num_layers // 2, num_layers - 3))
    return low, middle, high


def target_hash(sample: Sample, dtype: torch.dtype = torch.bfloat16) -> str:
    """Names a model's weights as they are in a dtype of 16 bits: 'outer-layers', 16 hex digits of SHA-256 each, so that
    the revisions of a model have the first half in common."""
    parts = [(part.to(dtype) + 0).view(torch.int16).cpu() for part in sample]  # + 0: for some readers 0 is -0
    return "-".join(hashlib.sha256(part.numpy().data).hexdigest()[:16] for part in parts)


def likeness(sample: Sample) -> str:
    """A few entries of the embedding, in bfloat16 and base64: what a model's revisions and quantisations have nearly in
    common, and other models do not."""
    return b64encode(sample.outer[-LIKENESS:].bfloat16().view(torch.int16).cpu().numpy().tobytes()).decode()


def _correlation(one: str, other: str) -> float:
    try:
        a, b = (torch.frombuffer(bytearray(b64decode(each)), dtype=torch.bfloat16).double() for each in (one, other))
        return float(torch.cosine_similarity(a, b, dim=0))
    except (TypeError, ValueError, RuntimeError):  # no base64, or of other lengths
        return 0.0


class Identity(NamedTuple):
    """Which weights a target has. hash: in a dtype of 16 bits, beside the field of a head's config that should say so;
    what float16 has rounded can no longer be rounded to bfloat16 as the weights themselves can."""

    field: str
    hash: str
    likeness: str

    @classmethod
    def of(cls, target: SharesVocabulary) -> Identity:
        sample, half = target.sample(), target.dtype == torch.float16
        field, dtype = ("target_hash_float16", torch.float16) if half else ("target_hash", torch.bfloat16)
        return cls(field, target_hash(sample, dtype), likeness(sample))

    def is_of(self, marks: Mapping[str, Any]) -> bool:
        """Whether a head, whose config has these `marks`, was trained for these weights."""
        return bool(marks.get(self.field) == self.hash)

    def resembles(self, marks: Mapping[str, Any]) -> bool:
        """Whether for these, or for a revision or another quantisation of them."""
        trained, near = marks.get(self.field) or "", marks.get("target_likeness")
        alike = near is not None and _correlation(near, self.likeness) > ALIKE
        return trained.partition("-")[0] == self.hash.partition("-")[0] or alike


def is_head(source: Any) -> bool:
    """Whether it is a folder with a head in it."""
    return head_kind(source) is not None


def head_kind(source: Any) -> str | None:
    """Of a folder with a head in it: of KINDS, if all is well; None for anything else."""
    if not isinstance(source, str | Path):
        return None
    path = Path(source).expanduser() / "config.json"
    return kind_of_head(read_json(path)) if path.is_file() else None


def load_head(folder: Path, target: LanguageModel, name: str) -> Drafter:
    """A head as a drafter for this target; FlashSpecError says what does not fit, or what the folder lacks."""
    config = read_json(folder / "config.json")
    kind = kind_of_head(config)
    if kind not in KINDS:
        raise FlashSpecError(f"{folder} holds a head of kind {kind!r}; the known ones are {', '.join(KINDS)}")
    if not isinstance(target, SharesVocabulary):
        raise FlashSpecError(f"the head in {folder} needs its target's embedding; a {type(target).__name__} has none")
    head = _Head(folder, config, target)
    return {"eagle3": _eagle, "medusa": _medusa, "tiny": _tiny}[kind](head, name)


def _open(folder: Path, kind: str | None) -> SafetensorsFolder:
    if any(folder.glob("*.safetensors*")):
        return SafetensorsFolder(folder, MEDUSA_FILE if (folder / MEDUSA_FILE).exists() else "model.safetensors")
    pickled, wanted = "pytorch_model.bin", "model.safetensors"
    if kind == "medusa":
        pickled, wanted = "medusa_lm_head.pt", MEDUSA_FILE
    raise FlashSpecError(
        f"{folder} has no {wanted}; a {pickled} is never loaded, as a pickle may run any code: convert it with "
        f"safetensors.torch.save_file(torch.load('{pickled}', weights_only=True), '{wanted}')"
    )


class _Head:
    """A head's folder beside its target."""

    def __init__(self, folder: Path, config: Mapping[str, Any], target: SharesVocabulary) -> None:
        self.folder, self.config, self.target, self.vocabulary = folder, config, target, target.vocabulary()
        for field, own in (("vocab_size", target.vocab_size), ("target_hidden_size", target.hidden_size)):
            if config.get(field, own) != own:
                raise self.refusal(f"its {field} is {config[field]} and the target's {own}")
        self._check_hash()
        self.file = _open(folder, kind_of_head(config))
        self.weights = Weights(self.file, target.device, target.dtype)
        self.part = self._part() if "d2t" in self.file else None

    def refusal(self, reason: str) -> FlashSpecError:
        return FlashSpecError(f"the head in {self.folder} does not fit this target: {reason}")

    def feature_layers(self) -> tuple[int, ...]:
        """The hidden states that it was trained on, as `Features.layers` counts: a layer's output enters the next. Our
        heads and SGLang's name layers by their output, vLLM's by what enters them."""
        count, given = self.target.num_layers, "eagle_aux_hidden_state_layer_ids"
        named = self.config.get("flashspec", {}).get("feature_layers")
        named = named or (self.config.get("eagle_config") or {}).get(given)
        entered = [layer + 1 for layer in named] if named else self.config.get(given) or eagle_layers(count)
        if any(not 0 <= layer < count for layer in entered):  # 0: the embedding
            raise self.refusal(f"it reads what enters layers {list(entered)}, and the target's last is {count - 1}")
        return tuple(entered)

    def scorer(self, hidden_size: int) -> Tensor:
        """The LM head: its own, or the target's rows for the tokens that it knows."""
        lm_head = self.vocabulary.lm_head
        size = len(lm_head) if self.part is None else len(self.part)
        if "lm_head.weight" in self.file:
            return self.weights.read((size, hidden_size), "lm_head.weight")
        self._shares(hidden_size, "LM head")
        return lm_head if self.part is None else lm_head[self.part]

    def embedder(self, hidden_size: int) -> Tensor:
        if "embed_tokens.weight" in self.file:
            return self.weights.read((self.target.vocab_size, hidden_size), "embed_tokens.weight")
        self._shares(hidden_size, "embedding")
        return self.vocabulary.embedding

    def decoder_config(self, num_layers: int) -> DecoderConfig:
        """Of its layers; their rotary angles have no end, so that its context is the target's."""
        config = decoder_config({"num_hidden_layers": num_layers, "model_type": "llama", **self.config})
        return replace(config, max_context=self.target.max_context, vocab_size=self.target.vocab_size)

    def _check_hash(self) -> None:
        """FlashSpecError for a model of other words; a warning for another revision, whose text stays exact."""
        ours = self.config.get("flashspec", {})
        own = Identity.of(self.target)
        trained, model = ours.get(own.field), ours.get("target") or "another model"
        if own.is_of(ours) or not (trained or ours.get("target_likeness")):
            return  # nothing tells
        if not own.resembles(ours):
            raise self.refusal(f"it was trained for the weights of {model}")
        if trained:
            revision = ours.get("revision") or "unknown"
            warnings.warn(
                f"the head in {self.folder} was trained for {model}, revision {revision}, weights {trained}, and this "
                f"target has others, weights {own.hash}: the text stays its own, but fewer drafts may be accepted",
                RuntimeWarning,
                stacklevel=2,
            )

    def _shares(self, hidden_size: int, what: str) -> None:
        if hidden_size != self.target.hidden_size:
            sizes = f"hidden_size is {hidden_size} and the target's {self.target.hidden_size}"
            raise self.refusal(f"it has no {what} of its own, and its {sizes}")

    def _part(self) -> Tensor:
        """(V',) int64, the tokens that its logits are of."""
        offsets = self.file.tensor("d2t").long()
        token_ids = torch.arange(len(offsets)) + offsets
        size = self.config.get("draft_vocab_size", len(offsets))
        known = len(self.file.tensor("t2d")) if "t2d" in self.file else self.target.vocab_size
        if size != len(offsets) or known != self.target.vocab_size:
            raise self.refusal(
                f"it maps {len(offsets)} of {known} tokens, but its config says {size} and the target has "
                f"{self.target.vocab_size}"
            )
        if token_ids.min() < 0 or token_ids.max() >= known or len(set(token_ids.tolist())) != size:
            raise self.refusal("its d2t names a token twice, or one outside the vocabulary")
        return token_ids.to(self.target.device)


def _eagle(head: _Head, name: str) -> Drafter:
    told = {**head.config, **(head.config.get("eagle_config") or {})}
    if unknown := [flag for flag in OTHER_FORMS if told.get(flag)]:
        raise FlashSpecError(f"the head in {head.folder} has {unknown[0]}, which FlashSpec does not know to compute")
    config = replace(head.decoder_config(1), windows=(None,))
    size, layers = config.hidden_size, head.feature_layers()
    fusion = Fusion(
        layers=layers,
        fc=head.weights.read((size, len(layers) * head.target.hidden_size), "fc.weight"),
        hidden_norm=head.weights.read((size,), "midlayer.hidden_norm.weight"),
        part=head.part,
    )
    weights = DecoderWeights(
        embedding=head.embedder(size),
        layers=(head.weights.layer(config, "midlayer", inputs=2),),
        final_norm=head.weights.read((size,), "norm.weight"),
        lm_head=head.scorer(size),
    )
    return EagleDrafter(EagleHead(config, weights, fusion), name)


def _medusa(head: _Head, name: str) -> Drafter:
    count, depth = head.config.get("medusa_num_heads", 0), head.config.get("medusa_num_layers", 1)
    if not (isinstance(count, int) and isinstance(depth, int) and count > 0 and depth > 0):
        raise head.refusal(f"medusa_num_heads is {count!r} and medusa_num_layers {depth!r}; both should be at least 1")
    size, part, target = head.target.hidden_size, head.part, head.target

    def stacked(shape: tuple[int, ...], block: int, kind: str) -> Tensor:
        """One tensor of all heads, (count, *shape)."""
        return torch.stack([head.weights.read(shape, f"{index}.{block}.{kind}") for index in range(count)])

    blocks = tuple(
        (stacked((size, size), i, "linear.weight"), stacked((size,), i, "linear.bias")) for i in range(depth)
    )
    beside = None
    if "fc.weight" in head.file:  # published heads have none
        layers = head.feature_layers()
        fc = head.weights.read((size, (len(layers) + 2) * size), "fc.weight")
        beside = Beside(layers, fc, head.embedder(size))
    own = score = None
    if f"0.{depth}.weight" in head.file:
        own = stacked((target.vocab_size if part is None else len(part), size), depth, "weight")
    else:
        score = target.logits if part is None else product_by(head.scorer(size))
    return MedusaDrafter(MedusaHeads(blocks, target.num_layers, own, score, part, beside), name)


def _tiny(head: _Head, name: str) -> Drafter:
    config = head.decoder_config(1)
    weights = DecoderWeights(
        embedding=head.embedder(config.hidden_size),
        layers=tuple(head.weights.layer(config, f"model.layers.{index}") for index in range(config.num_layers)),
        final_norm=head.weights.read((config.hidden_size,), "model.norm.weight"),
        lm_head=head.scorer(config.hidden_size),
    )
    return ModelDrafter(Decoder(config, weights), name, head.part)
