"""The target as training needs it: one that writes fast, and its weights in PyTorch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from flashspec.core import FlashSpecError
from flashspec.drafters.heads import likeness, target_hash
from flashspec.models.checkpoint import SafetensorsFolder, decoder_weights
from flashspec.models.decoder import Decoder
from flashspec.models.embedded import silent
from flashspec.models.gguf import GgufFile
from flashspec.models.loading import LoadedModel, load_model, locate
from flashspec.models.native import NativeModel
from flashspec.training.settings import Progress


@dataclass(frozen=True, slots=True)
class Target:
    """loaded: what writes. decoder: the same weights over whole sequences. revision, licence: '' where unknown."""

    loaded: LoadedModel
    decoder: Decoder
    revision: str
    licence: str

    @property
    def writable_ids(self) -> int:
        """How many of the ids are tokens: the rest of a padded vocabulary is never drafted."""
        tokenizer, size = self.loaded.tokenizer, self.decoder.vocab_size
        return min(tokenizer.vocab_size, size) if tokenizer else size

    def hash(self) -> str:
        """Which weights these are, whatever the dtype they are held in."""
        return target_hash(self.decoder.sample())

    def float16_hash(self) -> str | None:
        """The same of these weights in float16; None where bfloat16 has rounded them."""
        config = self.loaded.config
        stored = config.get("dtype") or config.get("torch_dtype")
        exact = self.decoder.dtype == torch.float32 or stored == "bfloat16"
        return target_hash(self.decoder.sample(), torch.float16) if exact else None

    def likeness(self) -> str:
        """What its revisions and quantisations have nearly in common."""
        return likeness(self.decoder.sample())


def load_target(source: str | Path, device: str | None = None, progress: Progress = silent) -> Target:
    """FlashSpecError where it is no model, or not one of the Llama family."""
    path = locate(source, progress)
    loaded = load_model(source, device=device, progress=progress)
    model, checkpoint = loaded.model, GgufFile(path) if path.is_file() else SafetensorsFolder(path)
    if isinstance(model, NativeModel):
        progress("loading the weights to train on", None)
        model = Decoder(model.config, decoder_weights(model.config, checkpoint, model.device, torch.float32))
    if not isinstance(model, Decoder):
        raise FlashSpecError(
            f"{loaded.name} runs through transformers: a drafter can be trained for the Llama family only"
        )
    return Target(loaded, model, _revision(path, checkpoint), _licence(path, checkpoint))


def _revision(path: Path, checkpoint: GgufFile | SafetensorsFolder) -> str:
    """The commit of a hub's snapshot, or a GGUF file's own name for its contents."""
    if isinstance(checkpoint, GgufFile):
        return checkpoint.identity
    return path.name if path.parent.name == "snapshots" else ""


def _licence(path: Path, checkpoint: GgufFile | SafetensorsFolder) -> str:
    if isinstance(checkpoint, GgufFile):
        return str(checkpoint.metadata.get("general.license", ""))
    card = path / "README.md"
    if not card.is_file():
        return ""
    found = re.search(r"^license:\s*(\S+)", card.read_text("utf-8", errors="replace"), re.MULTILINE)
    return found.group(1) if found else ""
