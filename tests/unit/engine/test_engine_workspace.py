"""Steps over a state that outlives requests, with a capture that stands in for CUDA graphs: it repeats the work with
the host's numbers as they were when it was recorded."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import EVERY_ARM, TakingTurns, every_drafter
from fakes import MarkovModel, greedy_text
from small_heads import VOCAB, write_eagle, write_medusa
from small_models import llama

from flashspec import FlashSpecConfig, SpeculativeEngine
from flashspec.core import Arm, FlashSpecError
from flashspec.drafters.base import DraftContext, Drafter, NoDraft, Proposer
from flashspec.drafters.heads import load_head
from flashspec.drafters.model import ModelDrafter
from flashspec.engine.graphs import WherePossible
from flashspec.engine.state import DecodeState
from flashspec.engine.workspace import MOST_SETTINGS, Workspaces
from flashspec.models.checkpoint import StateDict, decoder_config, decoder_weights
from flashspec.models.decoder import Decoder
from flashspec.models.loading import LoadedModel

TARGET = MarkovModel.random(7, seed=11, max_context=2000)
PROMPTS = [[1, 2, 3, 1, 2], [4], [5, 5, 6, 0, 1, 2, 3, 4, 5]]
Work = Callable[[], None]


class Recorder:
    """Counts what it records; `workspaces` is set once they exist. features: where its graphs write hidden states.
    faults: what it raises instead of recording, one each time, None for nothing; without an end for `refuses`."""

    def __init__(self, refuses: bool = False) -> None:
        self.recorded = 0
        refusals = (RuntimeError(f"operation {n} not permitted\nwhen capturing") for n in itertools.count(1))
        self.faults: Iterator[Exception | None] = refusals if refuses else iter(())
        self.features: set[int] = set()
        self.workspaces: Workspaces | None = None

    def __call__(self, work: Work) -> Work:
        if fault := next(self.faults, None):
            raise fault
        self.recorded += 1
        self.features |= {id(w.state.target.features) for w in self.workspaces._kept.values() if w.state.readers}
        bounds = {id(w.state): w.state.bound for w in self.workspaces._kept.values()}

        def replay() -> None:
            states = [w.state for w in self.workspaces._kept.values() if id(w.state) in bounds]
            now = [state.bound for state in states]
            for state in states:
                state.bound = bounds[id(state)]
            work()
            for state, bound in zip(states, now, strict=True):
                state.bound = bound

        return replay


def engine_of(
    arms: tuple[str, ...] = EVERY_ARM, refuses: bool = False, target: Any = TARGET, **drafters: Drafter
) -> Any:
    named = {**every_drafter(TARGET), **drafters}
    config = FlashSpecConfig(device="cpu", sampling={"temperature": 0.0})
    used = {Arm.parse(arm).drafter: named[Arm.parse(arm).drafter] for arm in arms if arm != "plain"}
    for name, drafter in used.items():
        drafter.name = name
    loaded = LoadedModel(target, None, (), "target")
    engine = SpeculativeEngine(config, list(used.values()), loaded, TakingTurns(len(arms)), arms=arms)
    recorder = Recorder(refuses)
    capture = WherePossible(recorder)
    engine.workspaces = recorder.workspaces = Workspaces(target, engine.arms, engine.drafters, capture)
    return engine, recorder


def rows(result: Any) -> list[list[int]]:
    return [[token for token in row if token >= 0] for row in result.output_ids.tolist()]


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
def test_requests_of_many_sizes_share_a_workspace(prompts: list[list[int]]) -> None:
    engine, recorder = engine_of()
    for count in (40, 7, 23):
        expected = [greedy_text(TARGET, prompt, count) for prompt in prompts]
        assert rows(engine.generate(prompts, count)) == expected
    assert len(engine.workspaces._kept) == 1
    recorded = recorder.recorded
    engine.generate(prompts, 30)
    assert recorder.recorded == recorded > len(set(EVERY_ARM))


def test_heads_read_what_graphs_record(tmp_path: Path) -> None:
    """Their drafts are those that an engine without graphs makes, step for step; a request keeps nothing of another.
    At a temperature of 5 most are accepted, and the text itself shows any other draft."""
    model = llama(VOCAB, num_hidden_layers=7, max_position_embeddings=200)
    config, state = decoder_config(model.config.to_dict()), StateDict(model.state_dict())
    target = Decoder(config, decoder_weights(config, state, torch.device("cpu"), torch.float32))
    folders = {"eagle": write_eagle(tmp_path / "eagle"), "medusa": write_medusa(tmp_path / "medusa", beside=True)}
    drafters = {name: load_head(folder, target, name) for name, folder in folders.items()}
    arms = ("plain", "eagle:2", "medusa:3", "eagle:12")
    ours, recorder = engine_of(arms, target=target, **drafters)
    eager, _ = engine_of(arms, target=target, **drafters)
    eager.workspaces = None
    prompts = [PROMPTS, [[1], [2, 2]], [[0, 5, 6] * 9]]
    for options in ({}, {"temperature": 0.8, "variant": "coupled", "seed": 3}, {"temperature": 5.0, "seed": 3}):
        for batch in prompts:
            for engine in (ours, eager):  # each its arms from the first one on
                engine.selector_for = lambda rows, costs: TakingTurns(len(arms))
            found, expected = (engine.generate(batch, 60, **options) for engine in (ours, eager))
            assert rows(found) == rows(expected)
            assert [[r.accepted for r in s.rows] for s in found.steps] == [
                [r.accepted for r in s.rows] for s in expected.steps
            ]
    assert recorder.recorded > len(arms)
    assert recorder.features == {id(w.state.target.features) for w in ours.workspaces._kept.values()}


@pytest.mark.parametrize("prompts", [[[1, 2, 3] * 8], [[1, 2, 3] * 8, [4, 4, 4, 4], [5, 1] * 9]])
def test_a_host_s_drafts_get_to_the_graphs(prompts: list[list[int]]) -> None:
    engine, _ = engine_of(("suffix:8",))
    found = engine.generate(prompts, 60)
    assert rows(found) == [greedy_text(TARGET, prompt, 60) for prompt in prompts]
    assert found.acceptance_length > 1.5


def test_many_rows_and_long_caches_are_read_by_sixteen_tokens() -> None:
    engine, _ = engine_of(("plain",))
    for rows, capacity, chunks in (2, 4096, (16, 128, 256)), (4, 4096, (16, 128)), (8, 1024, (16,)), (1, 8192, (16,)):
        assert DecodeState.allocate(engine.target, rows, capacity, 4).chunks == chunks


def test_prompts_of_many_rows_are_read_at_once() -> None:
    engine, _ = engine_of(("plain",))
    engine.target = engine.workspaces.model = reading = Reading()
    prompts = [[row % 7] * 60 for row in range(8)]
    for _ in range(2):
        assert rows(engine.generate(prompts, 4)) == [greedy_text(TARGET, prompt, 4) for prompt in prompts]
    assert reading.widths.count(59) == 2


def test_batches_of_every_size_up_to_32_rows_keep_their_graphs() -> None:
    engine, recorder = engine_of(("plain", "ngram:2"))
    for _ in range(2):
        recorded = recorder.recorded
        for size in (1, 2, 4, 8, 16, 32):
            engine.generate(PROMPTS[:1] * size, 3)
    assert recorder.recorded == recorded > 0


def test_cuts_of_like_size_share_graphs() -> None:
    engine, recorder = engine_of(("plain", "ngram:2"))
    eager, _ = engine_of(("plain", "ngram:2"))
    eager.workspaces = None
    options = {"temperature": 1.0, "seed": 1, "variant": "coupled"}
    texts, recorded = [], []
    for top_k in (3, 4):
        texts.append(rows(engine.generate(PROMPTS, 25, top_k=top_k, **options)))
        assert texts[-1] == rows(eager.generate(PROMPTS, 25, top_k=top_k, **options))
        recorded.append(recorder.recorded)
    assert recorded[0] == recorded[1] and texts[0] != texts[1]


def test_settings_that_were_not_asked_for_lately_are_forgotten() -> None:
    engine, recorder = engine_of(("plain", "ngram:2"))
    every = [{"logprobs": count, "variant": kind} for count in range(1, 7) for kind in ("rejection", "coupled")]
    for options in every:
        engine.generate(PROMPTS, 5, **options)
    (workspace,) = engine.workspaces._kept.values()
    kept = list(workspace._samplers)
    assert len(every) > len(kept) == MOST_SETTINGS
    assert {key[0] for key in workspace._captured if isinstance(key, tuple)} == set(kept)
    for options, more in ((every[-1], False), (every[0], True)):
        recorded = recorder.recorded
        assert rows(engine.generate(PROMPTS, 25, **options)) == [greedy_text(TARGET, prompt, 25) for prompt in PROMPTS]
        assert (recorder.recorded > recorded) == more


def test_a_longer_text_gets_a_larger_workspace() -> None:
    engine, _ = engine_of(("plain", "model:4"))
    for count in (40, 1500, 30):
        assert rows(engine.generate(PROMPTS[:1], count)) == [greedy_text(TARGET, PROMPTS[0], count)]
    assert [workspace.state.capacity for workspace in engine.workspaces._kept.values()] == [2000, 1024]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.8, "variant": "coupled"},
        {"temperature": 1.2, "variant": "coupled", "top_k": 4, "top_p": 0.9},
        {"temperature": 0.9, "variant": "coupled", "repetition_penalty": 1.3, "presence_penalty": 0.4},
        {"temperature": 0.9, "variant": "coupled", "min_tokens": 9, "stop_token_ids": [3, 4, 5, 6, 0]},
        {"logprobs": 3},
    ],
)
def test_settings_change_from_request_to_request(settings: dict[str, Any]) -> None:
    """Coupled text depends on seed, prompt and target alone."""
    ours, _ = engine_of()
    plain = SpeculativeEngine(ours.config, [], LoadedModel(TARGET, None, (), "target"), arms=["plain"])
    for seed in (1, 2, 3):
        for changes in (settings, {}, {**settings, "seed": seed + 10}):
            options = {"seed": seed, **changes}
            found, expected = (engine.generate(PROMPTS, 30, **options) for engine in (ours, plain))
            assert rows(found) == rows(expected)
            assert found.finish_reasons == expected.finish_reasons
            if "logprobs" in changes:
                pairs = zip(found.logprobs, expected.logprobs, strict=True)
                assert all([a.token_id for a in x] == [b.token_id for b in y] for x, y in pairs)


def test_a_conversation_reads_only_what_is_new() -> None:
    engine, _ = engine_of(("plain", "model:2"))
    read: list[int] = []
    forward = TARGET.forward

    class Counting(MarkovModel):
        def forward(self, token_ids: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
            read.append(token_ids.shape[1])
            return forward(token_ids, *arguments, **options)

    engine.target = engine.workspaces.model = Counting(TARGET.table, 2000)
    talk = engine.conversation()
    text = [1, 2, 3] * 100
    for turn in range(3):
        read.clear()
        generation = engine.stream([text], 20, memory=talk.memory)
        assert list(generation)
        answer = rows(generation.result())[0]
        assert answer == greedy_text(TARGET, text, 20)
        if turn:
            assert max(read) <= 16
        text = [*text, *answer, 2, 4]
    read.clear()
    assert rows(engine.generate([text], 5))[0] == greedy_text(TARGET, text, 5)
    assert sum(read) > 300  # nobody else's text is looked at


def test_what_cannot_be_captured_runs_as_it_is_and_one_warning_says_so() -> None:
    """Of two workspaces, and of every step refused for a reason of its own."""
    engine, _ = engine_of(("plain", "ngram:3", "model:2"), refuses=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for batch in (PROMPTS, PROMPTS[:1], PROMPTS):
            assert rows(engine.generate(batch, 25)) == [greedy_text(TARGET, prompt, 25) for prompt in batch]
    (warning,) = told
    assert warning.category is RuntimeWarning
    assert str(warning.message).endswith(
        "without a CUDA graph, since they cannot be captured: operation 1 not permitted"
    )


FULL = torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("before", [0, 3, 5, 6, 8])
def test_where_memory_runs_out_the_other_workspaces_go(before: int) -> None:
    """One of the captures (0 to 2 of forwards to time, 3 to 5 of a plain step, 6 to 8 of a draft) finds no memory;
    nothing is warned of, and everything is captured in the end."""
    engine, recorder = engine_of(("plain", "model:2"))
    engine.generate(PROMPTS, 25)
    others = [weakref.ref(workspace) for workspace in engine.workspaces._kept.values()]
    recorder.faults = iter([*[None] * before, FULL])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rows(engine.generate(PROMPTS[:1], 25)) == [greedy_text(TARGET, PROMPTS[0], 25)]
    assert [workspace() for workspace in others] == [None]
    (workspace,) = engine.workspaces._kept.values()
    recorded = recorder.recorded
    engine.generate(PROMPTS[:1], 25)
    assert recorder.recorded == recorded and set(engine.arms) <= {key[1] for key in workspace._captured if key[1:]}


@pytest.mark.parametrize("times", [2, 9])
def test_memory_that_stays_full_is_said_and_may_come_back(times: int) -> None:
    engine, recorder = engine_of(("plain", "model:2"))
    recorder.faults = iter([FULL] * times)
    for _ in range(times // 2):
        with pytest.raises(FlashSpecError, match="the GPU's memory is full: ask for fewer rows"):
            engine.generate(PROMPTS, 25)
    assert rows(engine.generate(PROMPTS, 25)) == [greedy_text(TARGET, prompt, 25) for prompt in PROMPTS]


class Reading(MarkovModel):
    """Notes the widths that it reads, and raises what it is told to."""

    def __init__(self, fault: Exception | None = None, at_width: int = 0) -> None:
        super().__init__(TARGET.table, 2000)
        self.widths: list[int] = []
        self.fault, self.at_width = fault, at_width

    def forward(self, token_ids: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        self.widths.append(token_ids.shape[1])
        if self.fault and self.widths[-1] == self.at_width:
            fault, self.fault = self.fault, None
            raise fault
        return super().forward(token_ids, *arguments, **options)


def test_memory_that_runs_out_in_a_prefill_is_made_room_for() -> None:
    engine, _ = engine_of(("plain",))
    engine.generate(PROMPTS, 5)
    engine.target = engine.workspaces.model = Reading(FULL, at_width=512)
    text = [1, 2, 3, 4] * 150 + [5]
    assert rows(engine.generate([text], 5)) == [greedy_text(TARGET, text, 5)]
    assert engine.target.fault is None and len(engine.workspaces._kept) == 1


def test_memory_that_is_full_from_the_start_or_in_a_text_is_said() -> None:
    with pytest.raises(FlashSpecError, match="the GPU's memory is full"):
        SpeculativeEngine({"device": "cpu"}, [], Reading(FULL, at_width=1))
    target = Reading()
    engine = SpeculativeEngine({"device": "cpu", "sampling": {"temperature": 0.0}}, [], target)
    target.fault, target.at_width = FULL, 1
    with pytest.raises(FlashSpecError, match="the GPU's memory is full"):
        engine.generate(PROMPTS[:1], 5)
    assert rows(engine.generate(PROMPTS[:1], 5)) == [greedy_text(TARGET, PROMPTS[0], 5)]


def test_a_step_that_failed_is_not_captured_before_it_has_run() -> None:
    """The first time compiles, and makes what a graph then holds."""
    engine, recorder = engine_of(("plain",))
    workspace = engine.workspaces.find(1, 10, 0)
    ran: list[str] = []

    def fail() -> None:
        raise ValueError("at first")

    with pytest.raises(ValueError):
        workspace._run("work", fail)
    recorded = recorder.recorded
    workspace._run("work", lambda: ran.append("as it is"))
    assert ran == ["as it is"] and recorder.recorded == recorded
    workspace._run("work", lambda: ran.append("captured"))
    assert recorder.recorded == recorded + 1


class Late(TakingTurns):
    """The first arm forty times, then the last."""

    def _choose(self, arms: Sequence[int]) -> int:
        return arms[0 if self._n_selected < 40 else -1]


def test_a_drafter_far_behind_catches_up_in_one_chunk() -> None:
    """43 tokens, by one graph of 128."""
    reading = Reading()
    engine, _ = engine_of(("plain", "behind:2"), behind=ModelDrafter(reading, "behind"))
    engine.generate(PROMPTS[:1], 2)
    engine.selector = Late(2)
    reading.widths.clear()
    text = rows(engine.generate([[1, 2, 3, 4]], 60))[0]
    assert text == greedy_text(TARGET, [1, 2, 3, 4], 60)
    assert [width for width in reading.widths if width > 2] == [128]


class Failing(Drafter):
    name = "failing"

    def start(self, context: DraftContext) -> Proposer:
        raise ValueError("no such thing")


def test_a_drafter_that_fails_is_set_aside() -> None:
    engine, _ = engine_of(("plain", "failing:2", "model:2"), failing=Failing())
    with pytest.warns(RuntimeWarning, match="'failing' is set aside"):
        found = rows(engine.generate(PROMPTS, 25))
    assert found == [greedy_text(TARGET, prompt, 25) for prompt in PROMPTS]


def test_what_a_failed_batch_left_behind_is_wiped() -> None:
    poisoned = MarkovModel(TARGET.table.clone(), 2000)
    poisoned.table[1, 2] = float("nan")  # PROMPTS[0] meets it, PROMPTS[1] does not
    engine, _ = engine_of(("plain", "model:2"))
    engine.target = engine.workspaces.model = poisoned
    assert engine.generate([[1, 2]], 10).finish_reasons == ["error"]
    (workspace,) = engine.workspaces._kept.values()
    assert all((reader.cache.keys == 0).all() for reader in workspace.state.readers)
    assert rows(engine.generate([[4]], 1)) == [greedy_text(TARGET, [4], 1)]


def test_the_least_recently_used_workspace_goes_first() -> None:
    engine, _ = engine_of(("plain",))
    spaces = engine.workspaces
    first, second = spaces.find(1, 10, 0), spaces.find(2, 10, 0)
    assert spaces.find(1, 1000, 3) is first
    for rows_wanted in (4, 8, 16, 32, 64, 128, 256):
        spaces.find(rows_wanted, 10, 0)
    assert spaces.find(1, 10, 0) is first and spaces.find(2, 10, 0) is not second


def test_no_draft_proposes_nothing() -> None:
    engine, _ = engine_of(("plain",))
    state = engine.workspaces.find(2, 10, 0).state
    assert NoDraft().propose(state, 0).token_ids.shape == (2, 0)
