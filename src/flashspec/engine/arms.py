"""From what a caller names to drafters and arms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from flashspec.core import PLAIN, Arm, FlashSpecError
from flashspec.drafters import Drafter, get_drafter, list_drafters
from flashspec.drafters.heads import is_head, load_head
from flashspec.drafters.host import GeneratesDraft, HostDrafter
from flashspec.drafters.model import ModelDrafter
from flashspec.drafters.shipped import shipped_heads
from flashspec.models.base import LanguageModel
from flashspec.models.loading import LoadedModel, locate

Load = Callable[[Any], tuple[LanguageModel, str]]
BEST_HEADS = ("eagle3",)  # of those that come with the package, the kinds that are used unasked


def listed(named: Any) -> list[Any]:
    """What an iterable holds; anything else, a text too, as a list of one."""
    return list(named) if isinstance(named, Iterable) and not isinstance(named, str) else [named]


def default_drafters(target: LanguageModel, strategy: str = "auto") -> list[str]:
    """Suffix matching, and the head that comes with the package if it was made for this target; `fixed` plays one."""
    shipped = shipped_heads(target) if strategy != "fixed" else {}
    return ["suffix", *(kind for kind in BEST_HEADS if kind in shipped)]


def make_drafter(source: Any, target: LanguageModel, load: Load) -> Drafter:
    """A drafter from itself, a registered name, a class with `generate_draft`, a head's folder or hub id, or a model in
    any form that `load` takes; `load` returns the model and a name for it."""
    if isinstance(source, type):
        raise ValueError(f"drafter {source.__name__} is a class; give an instance, such as {source.__name__}()")
    if isinstance(source, str) and source in list_drafters() and not is_head(source):
        cls = get_drafter(source)
        if not issubclass(cls, Drafter):
            return HostDrafter(cls(), source)
        drafter = cls.create(target)
        drafter.name = source  # arms are asked for by the name that the drafter was asked for by
        return drafter
    if isinstance(source, Drafter):
        return source
    if isinstance(source, GeneratesDraft):
        return HostDrafter(source, type(source).__name__.lower())
    folder = head_folder(source)
    if folder is not None:
        return load_head(folder, target, str(source))
    drafter = ModelDrafter(*load(source))
    drafter.check(target)
    return drafter


def load_drafter(source: Any, load: Callable[[Any], LoadedModel]) -> tuple[LanguageModel, str]:
    """A drafter's model and its name; FlashSpecError names the registered drafters too, one of which may be meant."""
    try:
        loaded = load(source)
    except FlashSpecError as error:
        known = ", ".join(list_drafters())
        raise FlashSpecError(f"drafter {source!r} is none of {known}, and no model: {error}") from None
    return loaded.model, loaded.name


def head_folder(source: Any) -> Path | None:
    """Where a head is, fetched first where the source is an id; None where it is anything else."""
    if isinstance(source, str) and "/" in source:
        try:
            source = locate(source)
        except FlashSpecError:  # the sentence for a drafter that is nowhere is `load`'s
            return None
    return Path(source).expanduser() if is_head(source) else None


def unique_names(drafters: Sequence[Drafter]) -> dict[str, Drafter]:
    """Drafters by name; a second one of the same name becomes name-2."""
    named: dict[str, Drafter] = {}
    for drafter in drafters:
        name, count = drafter.name, 2
        while name in named:
            name, count = f"{drafter.name}-{count}", count + 1
        named[name] = drafter
    return named


def default_arms(drafters: dict[str, Drafter]) -> list[Arm]:
    """Plain decoding, and every drafter at each of the lengths that suit it."""
    return [PLAIN, *(Arm(name, length) for name, drafter in drafters.items() for length in drafter.lengths)]


def check_arms(arms: Sequence[Arm], drafters: dict[str, Drafter]) -> list[Arm]:
    """Each once, none longer than its drafter can draft. ValueError where an arm names no drafter, or drafts more than
    any drafter can."""
    if not arms:
        raise ValueError("arms is empty; name at least one, for example 'plain'")
    for arm in arms:
        if arm.length and arm.drafter not in drafters:
            raise ValueError(f"arm {str(arm)!r} names no drafter of this engine; it has {sorted(drafters)}")
        if arm.length > Drafter.longest:
            raise ValueError(f"arm {str(arm)!r} drafts {arm.length} tokens; the most is {Drafter.longest}")
    within = [Arm(arm.drafter, min(arm.length, drafters[arm.drafter].longest)) if arm.length else arm for arm in arms]
    return list(dict.fromkeys(within))
