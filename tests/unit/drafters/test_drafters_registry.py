"""Drafters by name: ours, registered ones, and other packages'."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
from torch import Tensor

from flashspec.drafters import NoDraft, get_drafter, list_drafters, register, registry
from flashspec.drafters.early_exit import EarlyExitDrafter
from flashspec.drafters.model import ModelDrafter
from flashspec.drafters.ngram import NgramDrafter
from flashspec.drafters.suffix import SuffixDrafter


@pytest.fixture(autouse=True)
def no_leftovers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


class Mine:
    def generate_draft(self, input_ids: Tensor, gamma: int) -> tuple[Tensor, None]:
        return input_ids[:, -1:].expand(-1, gamma), None


def test_ours_are_known() -> None:
    ours = {"ngram": NgramDrafter, "suffix": SuffixDrafter, "early-exit": EarlyExitDrafter, "model": ModelDrafter}
    assert {name: get_drafter(name) for name in ours} == ours
    assert set(ours) <= set(list_drafters())


def test_a_registered_class_is_found_and_unchanged() -> None:
    assert register("mine")(Mine) is Mine
    assert get_drafter("mine") is Mine and "mine" in list_drafters()
    assert list_drafters() == sorted(list_drafters())


def test_a_taken_name_is_refused() -> None:
    register("mine")(Mine)
    for name in ("mine", "ngram"):
        with pytest.raises(ValueError, match=f"{name!r} is already registered"):
            register(name)(NoDraft)
    assert get_drafter("mine") is Mine


def test_a_class_defined_again_takes_its_name_over() -> None:
    """As happens when a notebook's cell is run twice."""
    register("mine")(Mine)
    again = type("Mine", (Mine,), {})
    register("mine")(again)
    assert get_drafter("mine") is again


@pytest.mark.parametrize(
    "what",
    [lambda: Mine(), type("Empty", (), {}), NoDraft, Mine()],
    ids=["function", "no drafter", "abstract", "instance"],
)
def test_only_a_drafters_class_is_registered(what: object) -> None:
    with pytest.raises(ValueError, match=r"drafter 'mine' is .*; it should be a class with generate_draft"):
        register("mine")(what)  # type: ignore[type-var]
    assert "mine" not in list_drafters()


@pytest.mark.parametrize("name", ["", None, Mine])
def test_only_a_text_is_a_name(name: object) -> None:
    with pytest.raises(ValueError, match="a drafter's name is"):
        register(name)  # type: ignore[arg-type]


def test_an_unknown_name_lists_the_known_ones() -> None:
    register("mine")(Mine)
    with pytest.raises(ValueError, match=r"'nothing'; known are eagle3, .*, medusa, mine, model, ngram, suffix"):
        get_drafter("nothing")


def test_entry_points_of_other_packages_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [EntryPoint("theirs", "flashspec.drafters.ngram:NgramDrafter", registry.ENTRY_POINTS)]

    def entry_points(group: str, name: str | None = None) -> list[EntryPoint]:
        assert group == "flashspec.drafters"
        return [entry for entry in entries if name in (None, entry.name)]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    assert "theirs" in list_drafters()
    assert get_drafter("theirs") is NgramDrafter
