"""Drafters by name: ours, a user's (`@register`), other packages' (entry-point group `flashspec.drafters`)."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar

from flashspec.drafters.base import Drafter
from flashspec.drafters.host import GeneratesDraft

ENTRY_POINTS = "flashspec.drafters"
BUILT_IN = {
    "ngram": "flashspec.drafters.ngram:NgramDrafter",
    "suffix": "flashspec.drafters.suffix:SuffixDrafter",
    "early-exit": "flashspec.drafters.early_exit:EarlyExitDrafter",
    "model": "flashspec.drafters.model:ModelDrafter",
    "eagle3": "flashspec.drafters.eagle:EagleDrafter",
    "medusa": "flashspec.drafters.medusa:MedusaDrafter",
}
_registered: dict[str, type[Any]] = {}
DrafterClass = TypeVar("DrafterClass", bound=type[Any])


def register(name: str) -> Callable[[DrafterClass], DrafterClass]:
    """Class decorator: make a drafter known by name. A taken name raises ValueError, unless by the same class; so does
    what is no drafter's class."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"a drafter's name is {name!r}; it should be a text, as in @register('mine')")

    def add(cls: DrafterClass) -> DrafterClass:
        known = _registered.get(name)
        if name in BUILT_IN or (known is not None and known.__qualname__ != cls.__qualname__):
            raise ValueError(f"a drafter named {name!r} is already registered; choose another name")
        if not isinstance(cls, type) or not issubclass(cls, Drafter | GeneratesDraft):
            raise ValueError(f"drafter {name!r} is {cls!r}; it should be a class with generate_draft, or a Drafter's")
        _registered[name] = cls
        return cls

    return add


def get_drafter(name: str) -> type[Any]:
    """The class registered under a name; ValueError lists the known ones."""
    if name in _registered:
        return _registered[name]
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        found: type[Any] = getattr(import_module(module), attribute)
        return found
    for entry in entry_points(group=ENTRY_POINTS, name=name):
        loaded: type[Any] = entry.load()
        return loaded
    raise ValueError(f"no drafter is named {name!r}; known are {', '.join(list_drafters())}")


def list_drafters() -> list[str]:
    """Every known name, sorted."""
    return sorted({*BUILT_IN, *_registered, *(entry.name for entry in entry_points(group=ENTRY_POINTS))})
