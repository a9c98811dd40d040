"""The engine as its callers see it."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
import torch
from decoding import (
    EVERY_ARM,
    Reciter,
    UniformSource,
    byte_tokenizer,
    engine_of,
    every_drafter,
    recite,
)
from fakes import MarkovModel, greedy_text
from small_models import llama

import flashspec
from flashspec.bandit import AutoSelector, FixedSelector, ThompsonSelector, UCB1Selector
from flashspec.config import FlashSpecConfig, MetricsConfig
from flashspec.core import PLAIN, Arm
from flashspec.drafters import registry
from flashspec.drafters.base import DraftContext, Drafter, Proposer
from flashspec.drafters.ngram import NgramDrafter, NgramProposer
from flashspec.engine import SpeculativeEngine

TARGET = MarkovModel.random(6, seed=41)
GREEDY = {"temperature": 0.0}


@pytest.fixture(autouse=True)
def no_leftovers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_registered", {})


def config_of(**settings: object) -> FlashSpecConfig:
    return FlashSpecConfig(device="cpu", **{"sampling": GREEDY, **settings})  # type: ignore[arg-type]


def test_the_public_names_are_there() -> None:
    for name in flashspec.__all__:
        assert getattr(flashspec, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        flashspec.nonsense  # noqa: B018


# The long way in


def test_one_arm_a_drafter_at_gamma_by_default() -> None:
    engine = SpeculativeEngine(config_of(sampling={"gamma": 3}), ["ngram", "suffix"], TARGET, None)
    assert engine.arms == [Arm("ngram", 3), Arm("suffix", 3)]
    assert isinstance(engine.selector, AutoSelector)
    assert SpeculativeEngine(config_of(), [], TARGET).arms == [PLAIN]


def test_the_given_selector_is_used() -> None:
    selector = UCB1Selector(2)
    engine = SpeculativeEngine(config_of(), ["ngram", "suffix"], TARGET, selector)
    result = engine.generate([[1, 2]], 20)
    assert engine.selector is selector and selector.t == len(result.steps) > 0


@pytest.mark.parametrize("strategy, kind", [("ucb1", UCB1Selector), ("thompson", ThompsonSelector)])
def test_the_configured_selector_is_made(strategy: str, kind: type) -> None:
    engine = SpeculativeEngine(config_of(bandit={"strategy": strategy, "window_size": 7}), ["ngram"], TARGET)
    assert isinstance(engine.selector, kind) and engine.selector.window_size == 7
    assert engine.generate([[1]], 5).output_ids.tolist() == [greedy_text(TARGET, [1], 5)]


def test_a_fixed_strategy_plays_the_first_arm() -> None:
    engine = SpeculativeEngine(config_of(bandit={"strategy": "fixed"}), ["ngram"], TARGET, arms=["ngram:2", "plain"])
    assert {str(step.arm) for step in engine.generate([[1]], 5).steps} == {"ngram:2"}


@pytest.mark.parametrize("bandit", [{"n_arms": 3}, {"n_arms": 3, "strategy": "ucb1"}])
def test_a_wrong_number_of_arms_is_refused(bandit: dict) -> None:
    with pytest.raises(ValueError, match="3 arms"):
        SpeculativeEngine(config_of(bandit=bandit), ["ngram"], TARGET)
    with pytest.raises(ValueError, match="bandit has 2 arms; the engine has 1"):
        SpeculativeEngine(config_of(), ["ngram"], TARGET, FixedSelector(2, 0))


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ([], "arms is empty"),
        (["other:2"], r"'other:2' names no drafter of this engine; it has \['ngram'\]"),
        (["ngram:65"], "the most is 64"),
        (["ngram"], "should read 'plain' or 'drafter:length'"),
        ([Arm("model", 2)], "names no drafter"),
        (["ngram:0"], "'ngram:0' drafts no token; write 'ngram:1' or more, or 'plain' for no draft"),
        (["ngram:²"], "should read 'plain' or 'drafter:length'"),
    ],
)
def test_bad_arms_are_refused(arms: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpeculativeEngine(config_of(), ["ngram"], TARGET, arms=arms)


def test_a_single_drafter_or_arm_is_a_list_of_one() -> None:
    for drafter in ("ngram", NgramDrafter()):
        for arm in ("ngram:2", Arm("ngram", 2)):
            engine = SpeculativeEngine(config_of(), drafter, TARGET, arms=arm)
            assert list(engine.drafters) == ["ngram"] and engine.arms == [Arm("ngram", 2)]
    assert list(SpeculativeEngine.from_pretrained(TARGET, "ngram", config=config_of()).drafters) == ["ngram"]


def test_an_arm_is_there_once_and_as_long_as_its_drafter_can_draft() -> None:
    class Short(NgramDrafter):
        longest = 4

    arms = ["plain", "ngram:3", "ngram:8", "ngram:4", "ngram:9", "plain"]
    engine = SpeculativeEngine(config_of(), [Short()], TARGET, arms=arms)
    assert engine.arms == [PLAIN, Arm("ngram", 3), Arm("ngram", 4)]


def test_a_drafter_that_is_nowhere_is_told_the_names_there_are() -> None:
    for make in (
        lambda: SpeculativeEngine(config_of(), ["sufix"], TARGET),
        lambda: SpeculativeEngine.from_pretrained(TARGET, ["sufix"], config=config_of()),
    ):
        with pytest.raises(flashspec.FlashSpecError, match=r"'sufix' is none of .*, suffix, and no model: there is no"):
            make()


@pytest.mark.parametrize("drafter", [UniformSource, NgramDrafter])
def test_a_class_is_no_drafter(drafter: type) -> None:
    with pytest.raises(ValueError, match=rf"{drafter.__name__} is a class; give an instance"):
        SpeculativeEngine(config_of(), [drafter], TARGET)


def test_drafters_of_one_name_are_numbered() -> None:
    engine = SpeculativeEngine(config_of(), [NgramDrafter(2), NgramDrafter(3), "ngram"], TARGET)
    assert list(engine.drafters) == ["ngram", "ngram-2", "ngram-3"]


# The short way in


class Doubling(Drafter):
    """Says the last token again."""

    lengths = (1, 2)

    def start(self, context: DraftContext) -> Proposer:
        return NgramProposer(1, 1)


def test_from_pretrained_takes_names_drafters_and_models() -> None:
    flashspec.register("doubling")(Doubling)
    flashspec.register("uniform")(
        type("Uniform", (UniformSource,), {"__init__": lambda self: super(type(self), self).__init__(6)})
    )
    drafters = ["ngram", "doubling", "uniform", UniformSource(6), MarkovModel(TARGET.table), NgramDrafter(5)]
    engine = SpeculativeEngine.from_pretrained(TARGET, drafters, config=config_of())
    assert list(engine.drafters) == ["ngram", "doubling", "uniform", "uniformsource", "MarkovModel", "ngram-2"]
    assert engine.arms[0] == PLAIN and Arm("doubling", 2) in engine.arms and Arm("ngram-2", 8) in engine.arms
    assert engine.generate([[1]], 30).output_ids.tolist() == [greedy_text(TARGET, [1], 30)]


def test_from_pretrained_takes_fields_of_the_config() -> None:
    engine = SpeculativeEngine.from_pretrained(
        TARGET, ["ngram"], device="cpu", sampling={"gamma": 2}, bandit={"strategy": "ucb1"}, max_new_tokens=3
    )
    assert engine.arms == [Arm("ngram", 2)]
    assert engine.generate([[1]]).n_tokens_generated == 3


def test_a_drafter_of_another_package_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("elsewhere", f"{__name__}:Doubling", registry.ENTRY_POINTS)
    monkeypatch.setattr(
        registry, "entry_points", lambda group, name=None: [entry] if name in (None, "elsewhere") else []
    )
    monkeypatch.setattr(EntryPoint, "load", lambda self: Doubling)
    engine = SpeculativeEngine.from_pretrained(TARGET, ["elsewhere"], config=config_of(), arms=["elsewhere:2"])
    assert engine.generate([[1]], 10).output_ids.tolist() == [greedy_text(TARGET, [1], 10)]


def test_a_transformers_model_is_target_and_drafter() -> None:
    model = llama(vocab_size=64)
    engine = SpeculativeEngine.from_pretrained(
        model, ["early-exit", model, "ngram"], config=config_of(dtype="float32", max_new_tokens=12)
    )
    prompt = torch.tensor([[3, 4, 5, 3, 4]])
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)[:, 5:]
    assert engine.generate(prompt, ignore_eos=True).output_ids.tolist() == expected.tolist()


def test_a_model_drafter_needs_a_model() -> None:
    with pytest.raises(ValueError, match="drafter 'model' needs a model"):
        SpeculativeEngine(config_of(), ["model"], TARGET)


# Prompts


def test_every_form_of_token_ids() -> None:
    engine = engine_of(TARGET)
    rows = [[1, 2, 3], [4]]
    expected = [greedy_text(TARGET, row, 5) for row in rows]
    assert engine.generate(rows, 5).output_ids.tolist() == expected
    for padded in ([[1, 2, 3], [4, -1, -1]], [[1, 2, 3], [-1, -1, 4]]):
        assert engine.generate(torch.tensor(padded), 5).output_ids.tolist() == expected
        assert engine.generate(padded, 5).output_ids.tolist() == expected


def test_text_lists_of_texts_and_chats() -> None:
    tokenizer = byte_tokenizer()
    target = Reciter(b"u:hi\na:hello", 256)
    engine = engine_of(target, [target.drafter()], ["scripted:2"], tokenizer=tokenizer)
    assert engine.generate([{"role": "user", "content": "hi"}], 5).text == "hello"
    assert engine.generate("u:hi\na:", 5).text == "hello"
    result = engine.generate(["u:hi\na:", "u:hi\na"], 5)
    assert result.texts == ["hello", ":hell"]
    assert result.prompt_lengths == [7, 6]


def test_a_batch_of_chats() -> None:
    target = Reciter(b"u:hi\na:hello", 256)
    engine = engine_of(target, [target.drafter()], ["scripted:2"], tokenizer=byte_tokenizer())
    chats = [[{"role": "user", "content": text}] for text in ("hi", "h")]
    result = engine.generate(chats, 5)
    assert result.texts == ["hello", ":hell"] and result.prompt_lengths == [7, 6]
    with pytest.raises(ValueError, match="prompt should be"):
        engine.generate([*chats, []], 5)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt is empty"),
        (torch.zeros(0, 3, dtype=torch.int64), "prompt is empty"),
        ([[1], []], "prompt 1 is empty"),
        (torch.tensor([[1, 2], [-1, -1]]), "prompt 1 is empty"),
        ([[1, 6]], r"prompt 0 holds ids outside 0\.\.5"),
        ([[1, -2]], "prompt 0 holds ids outside"),
        ([[1] * 512], "prompt 0 has 512 tokens; the target's context of 512"),
        (torch.zeros(3, dtype=torch.int64), r"int64 tensor of shape \(3,\)"),
        (torch.zeros(1, 3), "float32 tensor"),
        ("text", "no tokenizer"),
    ],
)
def test_bad_prompts_are_refused(prompt: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine_of(TARGET).generate(prompt, 5)  # type: ignore[arg-type]


def test_one_row_of_ids_may_be_flat() -> None:
    engine = engine_of(MarkovModel.random(6, seed=4), [], ["plain"])
    flat, nested = (engine.generate(prompt, 8, temperature=0).output_ids for prompt in ([1, 2, 3], [[1, 2, 3]]))
    assert torch.equal(flat, nested)


def test_settings_change_a_given_config() -> None:
    config = FlashSpecConfig(device="cpu", max_new_tokens=5)
    engine = SpeculativeEngine.from_pretrained(MarkovModel.random(6, seed=4), [], config=config, max_new_tokens=3)
    assert engine.generate([1], temperature=0).n_tokens_generated == 3


@pytest.mark.parametrize("variant", ["rejection", "coupled"])
def test_sampled_text_does_not_depend_on_its_place_in_the_batch(variant: str) -> None:
    """The row's number was once mixed into its seed."""
    engine = engine_of(MarkovModel.random(6, seed=4), [], ["plain"])
    batch = engine.generate([[3], [1, 2], [1, 2]], 12, temperature=1.0, seed=9, variant=variant).output_ids
    alone = engine.generate([[1, 2]], 12, temperature=1.0, seed=9, variant=variant).output_ids
    assert torch.equal(batch[1], alone[0])
    assert not torch.equal(batch[2], alone[0])  # the same prompt again is another sample


@pytest.mark.parametrize(
    "prompt",
    [
        *(None, 5, b"text", {"role": "user", "content": "hi"}, True, object()),
        *([1.0, 2.0], [[1.7, 2.2]], [True, False], [[1, True]], [b"text"], [None], [[1], "text"], [["text"]]),
        torch.tensor([[True, False]]),
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_what_is_no_prompt_is_refused_in_one_sentence(prompt: object) -> None:
    for engine in (recite("hello")[1], engine_of(TARGET)):
        with pytest.raises(ValueError, match=r"prompt should be text, messages|bool tensor"):
            engine.generate(prompt, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", ["", [""], ["a", ""], [{"role": "user"}], ["a", {"role": "user"}]])
def test_bad_texts_are_refused(prompt: object) -> None:
    _, engine = recite("hello")
    with pytest.raises(ValueError, match="prompt"):
        engine.generate(prompt, 5)  # type: ignore[arg-type]


# Settings


def test_single_fields_are_overridden_for_one_call() -> None:
    engine = engine_of(TARGET, temperature=1.0, seed=3)
    plain = engine.generate([[1]], 20).output_ids.tolist()
    assert engine.generate([[1]], 20, temperature=0).output_ids.tolist() == [greedy_text(TARGET, [1], 20)]
    assert engine.generate([[1]], 20, seed=4).output_ids.tolist() != plain
    assert engine.generate([[1]], 20).output_ids.tolist() == plain
    settings = flashspec.SamplingConfig(temperature=0)
    assert engine.generate([[1]], 20, sampling=settings).output_ids.tolist() == [greedy_text(TARGET, [1], 20)]
    assert engine.generate([[1]], 20, sampling=GREEDY).output_ids.tolist() == [greedy_text(TARGET, [1], 20)]


def test_settings_may_be_dicts() -> None:
    config = {"device": "cpu", "max_new_tokens": 4, "sampling": {"gamma": 3}}
    for make in (SpeculativeEngine, lambda config, *rest: SpeculativeEngine.from_pretrained(rest[1], config=config)):
        engine = make(config, ["ngram"], TARGET)
        assert engine.config.sampling.gamma == 3 and engine.generate([1]).n_tokens_generated == 4
    with pytest.raises(ValueError, match="gama"):
        SpeculativeEngine({"gama": 3}, ["ngram"], TARGET)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"max_new_tokens": 5.5}, "max_new_tokens is 5.5; it should be an integer"),
        ({"max_new_tokens": "5"}, "max_new_tokens is '5'; it should be an integer"),
        ({"sampling": {"heat": 1}}, "heat"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"gamma": 0}, "gamma"),
        ({"heat": 1}, "heat"),
        ({"stop": ("x",)}, "stop strings need a tokenizer"),
        ({"stop": ("",)}, "stop holds an empty string"),
        ({"stop_token_ids": (6,)}, "token 6; ids run from 0 to 5"),
        ({"logit_bias": {-1: 1.0}}, "token -1"),
    ],
)
def test_bad_settings_are_refused_and_the_engine_goes_on(changes: dict, message: str) -> None:
    engine = engine_of(TARGET)
    with pytest.raises(ValueError, match=message):
        engine.generate([[1]], **changes)
    assert engine.generate([[1]], 3).n_tokens_generated == 3


# Results


def test_the_result_adds_up() -> None:
    engine = engine_of(TARGET, list(every_drafter(TARGET).values()), EVERY_ARM)
    result = engine.generate([[1, 2], [3]], 20)
    assert result.output_ids.shape == (2, 20) and result.output_ids.dtype == torch.int64
    assert result.n_tokens_generated == sum(step.emitted for step in result.steps) == 40
    assert result.finish_reasons == ["length", "length"]
    assert result.prompt_lengths == [2, 1]
    assert result.texts is None and result.logprobs is None
    drafted, accepted = (sum(getattr(step, name) for step in result.steps) for name in ("drafted", "accepted"))
    assert 0 < accepted < drafted and result.acceptance_rate == accepted / drafted
    assert 1 < result.acceptance_length == 40 / sum(len(step.rows) for step in result.steps)
    assert result.tokens_per_second == pytest.approx(40 / result.seconds)
    assert sum(step.seconds for step in result.steps) <= result.seconds
    assert {step.arm for step in result.steps} <= set(engine.arms)


def test_shorter_rows_are_padded() -> None:
    target = Reciter([0, 1, 2, 3, 4, 5, 6, 7, 8], 16)
    result = engine_of(target, eos=[6]).generate([[0], [0, 1, 2, 3]], 8)
    assert result.output_ids.tolist() == [[1, 2, 3, 4, 5, 6], [4, 5, 6, -1, -1, -1]]
    assert result.n_tokens_generated == 9


@pytest.mark.parametrize("settings", [GREEDY, {"temperature": 0.7, "top_p": 0.8, "presence_penalty": 1.0, "seed": 2}])
def test_log_probabilities_are_the_targets_own(settings: dict) -> None:
    """Of the raw logits, whatever the transforms, at every emitted position."""
    engine = engine_of(TARGET, list(every_drafter(TARGET).values()), EVERY_ARM)
    prompts = [[1, 2, 1, 2], [3]]
    result = engine.generate(prompts, 20, logprobs=3, **settings)
    assert result.logprobs is not None
    for prompt, ids, entries in zip(prompts, result.output_ids.tolist(), result.logprobs, strict=True):
        assert [entry.token_id for entry in entries] == ids
        for place, entry in enumerate(entries):
            raw = TARGET.next_logprobs([*prompt, *ids[:place]])
            best = raw.topk(3)
            assert entry.logprob == pytest.approx(float(raw[entry.token_id]), abs=1e-5)
            assert [token_id for token_id, _ in entry.top] == best.indices.tolist()
            assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_more_log_probabilities_than_tokens_are_all_of_them() -> None:
    result = engine_of(TARGET).generate([[1]], 2, logprobs=20)
    assert result.logprobs is not None and [len(entry.top) for entry in result.logprobs[0]] == [6, 6]
    none = engine_of(TARGET).generate([[1]], 2, logprobs=0)
    assert none.logprobs is not None and none.logprobs[0][0].top == ()


def test_the_engine_keeps_metrics() -> None:
    engine = engine_of(TARGET, list(every_drafter(TARGET).values()), EVERY_ARM)
    results = [engine.generate([[1, 2]], 20), engine.generate([[3]], 20)]
    steps = [step for result in results for step in result.steps]
    metrics = engine.metrics
    assert metrics.throughput is not None and metrics.throughput.n_tokens == 40
    assert metrics.throughput.seconds == pytest.approx(sum(step.seconds for step in steps))
    assert metrics.acceptance is not None and metrics.acceptance.acceptance_rate == pytest.approx(
        sum(step.accepted for step in steps) / sum(step.drafted for step in steps)
    )
    assert metrics.latency is not None and metrics.latency.p50 > 0


def test_metrics_can_be_turned_off() -> None:
    off = MetricsConfig(track_acceptance=False, track_throughput=False, track_latency=False)
    engine = SpeculativeEngine(config_of(metrics=off), ["ngram"], TARGET)
    assert engine.generate([[1]], 5).n_tokens_generated == 5
    assert engine.metrics.acceptance is engine.metrics.throughput is engine.metrics.latency is None
