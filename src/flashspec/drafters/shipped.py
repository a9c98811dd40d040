"""Heads that come with the package, each for one target and whatever resembles it."""

from __future__ import annotations

from pathlib import Path

from flashspec.core import FlashSpecError
from flashspec.drafters.base import Drafter
from flashspec.drafters.heads import Identity, load_head
from flashspec.models.base import LanguageModel, SharesVocabulary
from flashspec.models.checkpoint import read_json

FOLDER = Path(__file__).parents[1] / "heads"  # one folder a head, with its card


def shipped_heads(target: LanguageModel) -> dict[str, Path]:
    """The folders by their kind of the heads that were trained for a target, or for a revision of it."""
    found = {path.parent: read_json(path) for path in sorted(FOLDER.glob("*/config.json"))}
    sized = {
        folder: config["flashspec"]
        for folder, config in found.items()
        if (config["vocab_size"], config["hidden_size"]) == (target.vocab_size, target.hidden_size)
    }
    if not sized or not isinstance(target, SharesVocabulary):
        return {}
    own = Identity.of(target)
    return {marks["kind"]: folder for folder, marks in sized.items() if own.resembles(marks)}


def load_shipped(kind: str, target: LanguageModel) -> Drafter:
    """FlashSpecError where there is none for the target."""
    folder = shipped_heads(target).get(kind)
    if folder is None:
        raise FlashSpecError(
            f"no {kind} head comes with FlashSpec for this target: make one with 'flashspec train-drafter' and name "
            "its folder"
        )
    return load_head(folder, target, kind)
