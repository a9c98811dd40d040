"""Drafters that are networks, and classes that only have generate_draft: what they propose, row by row."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from decoding import open_run
from fakes import MarkovModel, greedy_text

from flashspec.core import Draft
from flashspec.drafters.base import Drafter
from flashspec.drafters.early_exit import EarlyExitDrafter
from flashspec.drafters.host import HostDrafter
from flashspec.drafters.model import ModelDrafter
from flashspec.engine.loop import Run
from flashspec.engine.state import DecodeState

TARGET = MarkovModel.random(6, seed=51)
OTHER = MarkovModel.random(6, seed=52)
PROMPTS = [[1, 2, 3, 4], [5]]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def state_of(prompts: list[list[int]] = PROMPTS, **settings: object) -> DecodeState:
    return open_run(TARGET, prompts, ["plain"], {}, 40, **settings).state


def draft_of(drafter: Drafter, state: DecodeState, length: int = 3) -> Draft:
    state.prepare()
    proposer = drafter.start(state)
    proposer.prepare(state)
    return proposer.propose(state, length)


def test_a_model_writes_its_own_greedy_text() -> None:
    draft = draft_of(ModelDrafter(OTHER), state_of(temperature=0))
    assert draft.token_ids.tolist() == [greedy_text(OTHER, prompt, 3) for prompt in PROMPTS]
    assert draft.lengths.tolist() == [3, 3] and draft.logits is None


def test_a_sampled_draft_reports_what_it_was_drawn_from() -> None:
    draft = draft_of(ModelDrafter(OTHER), state_of(temperature=0.5))
    assert draft.logits is not None and draft.logits.shape == (2, 3, 6)
    for row, prompt in enumerate(PROMPTS):
        for place in range(3):
            raw = OTHER.next_logits(prompt + draft.token_ids[row, :place].tolist())
            torch.testing.assert_close(draft.logits[row, place], raw / 0.5)


def test_a_draft_ends_before_logits_that_are_not_finite() -> None:
    table = OTHER.table.clone()
    first = greedy_text(OTHER, PROMPTS[0], 1)[0]
    table[:, first] = float("nan")  # unsound once it has read its first draft token
    draft = draft_of(ModelDrafter(MarkovModel(table)), state_of(PROMPTS[:1], temperature=0))
    assert draft.lengths.tolist() == [1] and draft.faulty is not None and draft.faulty.tolist() == [True]
    assert draft.token_ids.shape == (1, 3) and draft.token_ids.max() < 6


def test_a_model_that_sat_out_catches_up() -> None:
    """After steps by others, its draft is still its own greedy continuation of the whole text."""
    run: Run = open_run(TARGET, PROMPTS, ["plain", "plain", "plain", "model:2"], {"model": ModelDrafter(OTHER)}, 40)
    for number, _ in enumerate(run):
        if number == 5:  # after the model's first step and two without it
            break
    proposer = run.proposers["model"]
    run.state.prepare()
    proposer.prepare(run.state)
    drafted = proposer.propose(run.state, 1).logits
    assert drafted is not None
    for row, text in enumerate(run.state.texts):
        torch.testing.assert_close(drafted[row, 0], OTHER.next_logits(text))


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"drafter 'small' has 5 tokens.*the target 6"):
        ModelDrafter(MarkovModel.random(5, 1), "small").start(state_of())
    with pytest.raises(ValueError, match="name its id, folder or GGUF file"):
        ModelDrafter.create(TARGET)


def test_an_early_exit_drafts_with_the_first_layers() -> None:
    """The fake's first layer knows the last token only."""
    draft = draft_of(EarlyExitDrafter(1), state_of(temperature=0))
    shallow = MarkovModel(TARGET.table[:1].expand(6, -1, -1))
    assert draft.token_ids.tolist() == [greedy_text(shallow, prompt, 3) for prompt in PROMPTS]


def test_an_early_exit_needs_fewer_layers_than_the_target() -> None:
    assert EarlyExitDrafter.create(TARGET).num_layers == 1  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="num_layers is 0"):
        EarlyExitDrafter(0)
    with pytest.raises(ValueError, match="num_layers is 2; the target has 2"):
        EarlyExitDrafter(2).start(state_of())


class Recorder:
    """generate_draft that notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def generate_draft(self, input_ids: torch.Tensor, gamma: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked.append(input_ids[0].tolist())
        logprobs = torch.full((1, gamma, 6), -2.0)
        logprobs[0, 1:] = float("nan") if input_ids[0, -1] == 5 else -1.0
        return torch.full((1, gamma), 2), logprobs


def test_generate_draft_is_asked_for_every_active_row_alone() -> None:
    source, state = Recorder(), state_of()
    draft = draft_of(HostDrafter(source, "host"), state)
    assert source.asked == PROMPTS
    assert draft.lengths.tolist() == [3, 1] and draft.faulty is not None and draft.faulty.tolist() == [False, True]
    assert draft.logits is not None and draft.logits.shape == (2, 3, 6)
    state.active[0] = False
    draft_of(HostDrafter(source, "host"), state)
    assert source.asked[2:] == PROMPTS[1:]


class Sparing:
    """Nothing for one row, a token for the other."""

    def generate_draft(self, input_ids: torch.Tensor, gamma: int) -> tuple[torch.Tensor, None]:
        return torch.full((1, int(input_ids.tolist() == PROMPTS[:1])), 4), None


def test_generate_draft_may_find_less_than_it_was_asked_for() -> None:
    draft = draft_of(HostDrafter(Sparing(), "host"), state_of())
    assert draft.lengths.tolist() == [1, 0] and draft.token_ids[0, 0] == 4
    assert draft.faulty is not None and not draft.faulty.any()


class Certain:
    """Log-probabilities for one row, and none for the other."""

    def generate_draft(self, input_ids: torch.Tensor, gamma: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        first = input_ids.tolist() == PROMPTS[:1]
        return torch.full((1, gamma), 4), torch.zeros(1, gamma, 6) if first else None


def test_no_log_probabilities_say_that_a_draft_is_certain() -> None:
    draft = draft_of(HostDrafter(Certain(), "host"), state_of())
    assert draft.lengths.tolist() == [3, 3] and draft.logits is not None
    expected = torch.stack([torch.full((3, 6), 1 / 6), torch.eye(6)[[4, 4, 4]]])
    torch.testing.assert_close(draft.logits.softmax(-1), expected)
