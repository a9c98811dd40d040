"""Numbers that are not finite, drafters that fail, targets that fail: what each of them costs."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from decoding import EVERY_ARM, TakingTurns, decode, engine_of, every_drafter, open_run
from fakes import MarkovModel, ScriptedDrafter, greedy_text

from flashspec.core import Draft
from flashspec.drafters.base import DraftContext, Drafter, Proposer
from flashspec.drafters.host import HostDrafter
from flashspec.drafters.model import ModelDrafter

NAN, INF = float("nan"), float("inf")
PROMPTS = [[1, 2, 1], [4], [3, 3]]
SEPARATE = [arm for arm in EVERY_ARM if "early-exit" not in arm]  # that one shares the target's faults


def poisoned(bad: float) -> tuple[MarkovModel, MarkovModel]:
    """A target that is sound until it has read a 5, which only follows a 4, which nothing leads to; and its twin
    without that fault."""
    table = MarkovModel.random(6, seed=31).table
    table[..., 5] = -30.0
    table[:, 4, 5] = 30.0
    table[:, :4, 4] = -30.0
    sound = MarkovModel(table.clone())
    table[:, 5, 2] = bad
    return MarkovModel(table), sound


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"seed": 1}, {"variant": "coupled"}, {"variant": "typical"}])
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("arms", [["plain"], ["ngram:3"], ["model:4"], SEPARATE], ids="+".join)
def test_a_target_row_that_is_not_finite_ends_its_request_only(
    arms: list[str], bad: float, settings: dict, lag: int
) -> None:
    target, sound = poisoned(bad)
    run = open_run(target, PROMPTS, arms, every_drafter(sound), 20, lag=lag, **settings)
    finish = {row: output.news.finish[row].name for output in run for row in output.rows}
    assert finish == {0: "LENGTH", 1: "ERROR", 2: "LENGTH"}
    if settings == {"temperature": 0}:
        for row in (0, 2):
            assert run.state.texts[row] == PROMPTS[row] + greedy_text(sound, PROMPTS[row], 20)
    assert run.state.texts[1] == [4, 5]  # the 5 was accepted, whatever came behind it


def test_a_row_of_negative_infinities_is_an_error() -> None:
    table = MarkovModel.random(4, seed=1).table
    table[:] = -INF
    result = engine_of(MarkovModel(table)).generate([[1]], 5)
    assert result.finish_reasons == ["error"] and result.n_tokens_generated == 0


def test_an_engine_is_clean_after_an_error() -> None:
    target, sound = poisoned(NAN)
    engine = engine_of(target, list(every_drafter(sound).values()), ["ngram:3", "model:3"])
    assert engine.generate([[4]], 10).finish_reasons == ["error"]
    assert engine.generate([[1, 2]], 10).output_ids.tolist() == [greedy_text(sound, [1, 2], 10)]


def test_other_log_probabilities_stay_finite_beside_an_error() -> None:
    target, _ = poisoned(NAN)
    result = engine_of(target).generate(PROMPTS, 5, logprobs=2)
    assert result.logprobs is not None
    assert all(entry.logprob <= 0 for row in (0, 2) for entry in result.logprobs[row])


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"variant": "coupled", "seed": 1}, {"seed": 1}])
def test_a_draft_that_is_not_finite_costs_that_draft(settings: dict, bad: float, lag: int) -> None:
    target = MarkovModel.random(6, seed=32)
    table = target.table.clone()
    table[:, 3] = bad  # sound until it has read a 3
    run = open_run(target, PROMPTS, ["model:4"], {"model": ModelDrafter(MarkovModel(table))}, 30, lag=lag, **settings)
    with pytest.warns(RuntimeWarning, match="'model' is set aside for this request: its draft held NaN"):
        records = [output.record for output in run]
    assert [len(text) for text in run.state.texts] == [len(prompt) + 30 for prompt in PROMPTS]
    assert str(records[0].arm) == "model:4" and str(records[-1].arm) == "plain"
    if settings != {"seed": 1}:
        plain = decode(target, PROMPTS, ["plain"], {}, 30, **settings)
        assert [text[len(prompt) :] for text, prompt in zip(run.state.texts, PROMPTS, strict=True)] == plain


class Failing(Drafter):
    """Works until its `at` is called for the nth time."""

    name = "failing"

    def __init__(self, at: str, nth: int = 1) -> None:
        self.at, self.left = at, nth

    def step(self, name: str) -> None:
        self.left -= name == self.at
        if self.left == 0:
            self.left = -1000
            raise OSError("out of ink")

    def start(self, context: DraftContext) -> Proposer:
        self.step("start")
        drafter = self

        class Fails(Proposer):
            def prepare(self, context: DraftContext) -> None:
                drafter.step("prepare")

            def propose(self, context: DraftContext, length: int) -> Draft:
                drafter.step("propose")
                return Draft(torch.zeros(len(context.texts), length, dtype=torch.int64), context.lengths * 0 + length)

        return Fails()


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(("at", "nth"), [("start", 1), ("prepare", 1), ("prepare", 3), ("propose", 1), ("propose", 2)])
@pytest.mark.parametrize("arms", [["failing:3"], ["failing:2", "failing:4"], ["failing:3", "ngram:2", "plain"]])
def test_a_drafter_that_raises_is_set_aside_and_the_request_goes_on(
    arms: list[str], at: str, nth: int, lag: int
) -> None:
    target = MarkovModel.random(6, seed=33)
    drafters = {**every_drafter(target), "failing": Failing(at, nth)}
    run = open_run(target, PROMPTS, arms, drafters, 20, temperature=0, lag=lag)
    with pytest.warns(RuntimeWarning, match="'failing' is set aside for this request: OSError: out of ink") as caught:
        records = [output.record for output in run]
    assert len(caught) == 1
    assert sum(record.arm.drafter == "failing" for record in records) == nth - 1
    assert [text[len(p) :] for text, p in zip(run.state.texts, PROMPTS, strict=True)] == [
        greedy_text(target, prompt, 20) for prompt in PROMPTS
    ]


def test_a_drafter_set_aside_is_back_with_the_next_request() -> None:
    target = MarkovModel.random(6, seed=33)
    engine = engine_of(target, [Failing("propose")], ["failing:2", "plain"])
    with pytest.warns(RuntimeWarning, match="set aside"):
        records = engine.generate([[1]], 5).steps
    assert {str(record.arm) for record in records} == {"plain"}
    records = engine.generate([[1]], 5).steps
    assert "failing" in {record.arm.drafter for record in records}


def test_an_arm_that_the_caller_disabled_stays_so() -> None:
    target = MarkovModel.random(6, seed=33)
    engine = engine_of(target, [Failing("propose")], ["failing:2", "plain"])
    engine.selector.disable(0)
    assert {str(record.arm) for record in engine.generate([[1]], 30).steps} == {"plain"}
    assert engine.selector.enabled == (1,)


def test_two_drafters_that_fail_are_told_apart() -> None:
    target = MarkovModel.random(6, seed=33)
    first, second = Failing("start"), Failing("propose", 2)
    second.name = "second"
    engine = engine_of(target, [first, second], ["failing:2", "second:2"])
    with pytest.warns(RuntimeWarning) as caught:
        result = engine.generate([[1]], 12)
    assert sorted(str(warning.message).split("'")[1] for warning in caught) == ["failing", "second"]
    assert result.output_ids.tolist() == [greedy_text(target, [1], 12)]


class WrongShape:
    def generate_draft(self, input_ids: torch.Tensor, gamma: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(1, gamma + 1, dtype=torch.int64), torch.zeros(1, gamma + 1, 6)


class Probabilities:
    def generate_draft(self, input_ids: torch.Tensor, gamma: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(1, gamma, dtype=torch.int64), torch.full((1, gamma, 6), 1 / 6)


class OutOfVocabulary:
    def generate_draft(self, input_ids: torch.Tensor, gamma: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((1, gamma), 6), torch.zeros(1, gamma, 6)


class CertainlyOutside:
    def generate_draft(self, input_ids: torch.Tensor, gamma: int) -> tuple[torch.Tensor, None]:
        return torch.full((1, gamma), -1), None


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (WrongShape(), r"shapes \(1, 3\) and \(1, 3, 6\)"),
        (Probabilities(), "a log-probability of 0.167, above 0"),
        (OutOfVocabulary(), "the vocabulary"),
        (CertainlyOutside(), "the vocabulary"),
    ],
)
def test_generate_draft_is_not_trusted(source: object, reason: str) -> None:
    target = MarkovModel.random(6, seed=34)
    with pytest.warns(RuntimeWarning, match=reason):
        texts = decode(target, [[1]], ["host:2"], {"host": HostDrafter(source, "host")}, 10, temperature=0)
    assert texts == [greedy_text(target, [1], 10)]


class Faltering(MarkovModel):
    """Raises at its nth forward."""

    left = -1

    def forward(self, *arguments, **options):  # type: ignore[no-untyped-def]
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("the device is gone")
        return super().forward(*arguments, **options)


@pytest.mark.parametrize("nth", [1, 2, 4])
@pytest.mark.parametrize("arm", ["plain", "ngram:2", "model:2"])
def test_an_exception_of_the_target_is_the_callers_and_the_engine_stays_usable(arm: str, nth: int) -> None:
    target = Faltering(MarkovModel.random(6, seed=35).table)
    engine = engine_of(target, list(every_drafter(MarkovModel(target.table)).values()), [arm])
    target.left = nth
    with pytest.raises(RuntimeError, match="the device is gone"):
        engine.generate([[1, 2, 3]], 10)
    assert engine.generate([[1, 2, 3]], 10).output_ids.tolist() == [greedy_text(target, [1, 2, 3], 10)]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("context", [4, 9, 20, 33])
@pytest.mark.parametrize("arms", [["model:3"], ["model:3", "plain", "ngram:2"]], ids="+".join)
def test_a_drafter_whose_context_is_shorter_than_the_text(arms: list[str], context: int, lag: int) -> None:
    target = MarkovModel.random(6, seed=36)
    drafters = {**every_drafter(target), "model": ModelDrafter(MarkovModel(target.table, max_context=context))}
    run = open_run(target, PROMPTS, arms, drafters, [10, 40, 40], temperature=0, lag=lag)
    with pytest.warns(RuntimeWarning, match=f"outgrown the drafter's context of {context} tokens"):
        records = [output.record for output in run]
    assert str(records[0].arm) == "model:3"
    assert [text[len(p) :] for text, p in zip(run.state.texts, PROMPTS, strict=True)] == [
        greedy_text(target, prompt, count) for prompt, count in zip(PROMPTS, [10, 40, 40], strict=True)
    ]


def test_a_drafter_of_the_targets_quality_is_accepted_up_to_its_contexts_end() -> None:
    """The cache of a short drafter holds the text's own tokens until the last slot."""
    target = MarkovModel.random(6, seed=37)
    drafters = {"model": ModelDrafter(MarkovModel(target.table, max_context=20))}
    with pytest.warns(RuntimeWarning, match="outgrown"):
        records = [o.record for o in open_run(target, [[1]], ["model:2"], drafters, 40, temperature=0)]
    drafted = [record for record in records if record.arm.length]
    # A step begins below 20 tokens; a draft at 18 or 19 may run over the edge.
    assert sum(record.emitted for record in drafted) >= 18
    assert all(record.accepted == record.drafted for record in drafted[:-1])


def test_a_drafter_with_another_vocabulary_is_set_aside_with_a_reason() -> None:
    target = MarkovModel.random(6, seed=38)
    with pytest.warns(RuntimeWarning, match=r"'model' has 5 tokens.*the target 6"):
        texts = decode(target, [[1]], ["model:2"], {"model": ModelDrafter(MarkovModel.random(5, 1))}, 8, temperature=0)
    assert texts == [greedy_text(target, [1], 8)]


def test_scripted_drafts_that_are_empty_cost_nothing_but_time() -> None:
    target = MarkovModel.random(6, seed=39)
    drafters = {"scripted": ScriptedDrafter(lambda text, length: [])}
    run = open_run(target, PROMPTS, ["scripted:4"], drafters, 6, temperature=0)
    records = [output.record for output in run]
    assert [record.emitted for record in records] == [3] * 6
    assert all(record.drafted == 0 for record in records)


class GivingWay(TakingTurns):
    gives_way = True
    gave_way = 0

    def give_way(self, arm: int, seconds: float = 0.0) -> None:
        self.gave_way += 1
        super().give_way(arm, seconds)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"variant": "coupled"}])
def test_an_arm_with_nothing_to_propose_gives_way(settings: dict, lag: int) -> None:  # type: ignore[type-arg]
    """Two thirds of the text positions have no draft; the other arm then takes the step, and hears of it alone."""
    target = MarkovModel.random(6, seed=39)
    drafters = every_drafter(target) | {"scripted": ScriptedDrafter(lambda text, length: [1] * (len(text) % 3 == 0))}
    arms = ["scripted:4", "model:2"]
    selector = GivingWay(2)
    run = open_run(target, PROMPTS[:1], arms, drafters, 40, lag=lag, selector=selector, **settings)
    records = [output.record for output in run]
    assert run.state.texts[0][3:] == decode(target, PROMPTS[:1], ["plain"], drafters, 40, **settings)[0]
    assert all(record.drafted for record in records[:-2])
    assert {str(record.arm) for record in records} == set(arms)
    assert 0 < selector.gave_way < len(records)
    for stats, arm in zip(selector.stats, arms, strict=True):
        assert stats.n_drafted == sum(record.drafted for record in records if str(record.arm) == arm)


def test_a_drafter_that_fails_after_another_gave_way_costs_neither_text() -> None:
    target = MarkovModel.random(6, seed=39)

    def fail(text: list[int], length: int) -> list[int]:
        raise RuntimeError("broken")

    drafters = {"mute": ScriptedDrafter(lambda text, length: []), "failing": ScriptedDrafter(fail, "failing")}
    with pytest.warns(RuntimeWarning, match="'failing' is set aside for this request: RuntimeError: broken"):
        run = open_run(target, PROMPTS[:1], ["mute:2", "failing:2"], drafters, 6, selector=GivingWay(2), temperature=0)
        assert [str(output.record.arm) for output in run] == ["plain"] * 6
    assert run.state.texts == [PROMPTS[0] + greedy_text(target, PROMPTS[0], 6)]


def test_where_all_arms_give_way_decoding_is_plain() -> None:
    target = MarkovModel.random(6, seed=39)
    drafters = {"scripted": ScriptedDrafter(lambda text, length: [])}
    run = open_run(target, PROMPTS, ["scripted:2", "scripted:4"], drafters, 6, selector=GivingWay(2), temperature=0)
    assert [str(output.record.arm) for output in run] == ["plain"] * 6
    assert run.state.texts == [prompt + greedy_text(target, prompt, 6) for prompt in PROMPTS]


class Offering(Drafter):
    """Always proposes the same, however much it was asked for."""

    name = "offering"

    def __init__(self, draft: Draft) -> None:
        self.draft = draft

    def start(self, context: DraftContext) -> Proposer:
        draft = self.draft

        class Offers(Proposer):
            def propose(self, context: DraftContext, length: int) -> Draft:
                return draft

        return Offers()


ONE, THREE = torch.tensor([1]), torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        (Draft(torch.tensor([[99]]), ONE), "ids outside the vocabulary of 7"),
        (Draft(torch.ones(1, 4, dtype=torch.int64), ONE), "4 columns"),
        (Draft(THREE.int(), ONE), "draft's token_ids should be torch.int64: got torch.int32"),
        (Draft(THREE[0], ONE), r"token_ids should have shape \(1, 3\): got \(3,\)"),
        (Draft(THREE.repeat(2, 1), ONE), r"token_ids should have shape \(1, 3\): got \(2, 3\)"),
        (Draft(THREE, ONE.repeat(2)), r"lengths should have shape \(1,\): got \(2,\)"),
        (Draft(THREE, ONE.float()), "lengths should be torch.int64: got torch.float32"),
        (Draft(THREE, -ONE), r"lengths are \[-1\]; it has 3 columns"),
        (Draft(THREE, ONE + 3), r"lengths are \[4\]; it has 3 columns"),
        (Draft(THREE, ONE, torch.zeros(1, 3, 8)), r"logits should have shape \(1, 3, 7\): got \(1, 3, 8\)"),
        (Draft(THREE, ONE, None, ONE), "faulty should be torch.bool: got torch.int64"),
    ],
)
def test_a_draft_that_cannot_be_scored_costs_the_drafter_its_place(draft: Draft, message: str) -> None:
    target = MarkovModel.random(7, seed=11)
    with pytest.warns(RuntimeWarning, match=message):
        found = decode(target, [[1, 2]], ["plain", "offering:3"], {"offering": Offering(draft)}, 20, temperature=0)
    assert found == [greedy_text(target, [1, 2], 20)]


def test_who_sits_out_reads_no_more_than_the_text_when_it_comes_back() -> None:
    """With feedback a step late the host first counts the width of a draft, then what was emitted."""
    target = MarkovModel.random(7, seed=11)
    read: list[int] = []

    class Counting(MarkovModel):
        def forward(self, token_ids, *arguments, **options):  # type: ignore[no-untyped-def]
            read.append(token_ids.shape[1])
            return super().forward(token_ids, *arguments, **options)

    class RarelyTheModel(TakingTurns):
        def _choose(self, arms):  # type: ignore[no-untyped-def]
            return int(self._n_selected % 20 == 19)

    drafters = {"scripted": ScriptedDrafter(lambda text, n: [0] * n), "near": ModelDrafter(Counting(target.table))}
    arms = ["scripted:8", "near:2"]
    run = open_run(target, [[1, 2]], arms, drafters, 200, lag=1, selector=RarelyTheModel(2), temperature=0)
    for _ in run:
        pass
    assert run.state.texts[0][2:] == greedy_text(target, [1, 2], 200)
    assert sum(read) < 300


@pytest.mark.parametrize("lag", [0, 1])
def test_a_reader_that_read_for_an_arm_which_gave_way_is_known_to_be_behind(lag: int) -> None:
    """A drafter with a cache of its own that proposes nothing at every other of its steps."""
    target = MarkovModel.random(7, seed=12)

    class Shy(ModelDrafter):
        def start(self, context: DraftContext) -> Proposer:
            proposer, steps = super().start(context), count(1)

            class Shily(Proposer):
                def prepare(self, context: DraftContext) -> None:
                    proposer.prepare(context)

                def propose(self, context: DraftContext, length: int) -> Draft:
                    draft = proposer.propose(context, length)
                    return draft if next(steps) % 2 else Draft.empty(1, context.tokens.device)

            return Shily()

    truth = [1, 2, *greedy_text(target, [1, 2], 160)]
    drafters = {"shy": Shy(target), "right": ScriptedDrafter(lambda text, n: truth[len(text) :][:n])}
    run = open_run(target, [[1, 2]], ["shy:4", "right:8"], drafters, 150, lag=lag, selector=GivingWay(2), temperature=0)
    for _ in run:
        written = len(run.state.texts[0])
        if not run.flights:  # what is under way has read more than the host knows
            assert all(written - 1 - int(reader.cached[0]) <= reader.stale for reader in run.state.readers)
    assert run.state.texts[0] == truth[:152]
