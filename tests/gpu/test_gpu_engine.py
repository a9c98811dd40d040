"""Whole steps as CUDA graphs: the text of eager decoding and of transformers, no synchronisation, faults."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers as tf
from decoding import TakingTurns
from fakes import MarkovModel
from small_models import llama, randomised
from statistics_of_text import g_test, joint_distribution
from strict import assert_no_step_synchronises
from torch import Tensor

from flashspec import FlashSpecConfig, SamplingConfig, SpeculativeEngine
from flashspec.core import Draft
from flashspec.drafters.base import DraftContext, Drafter, Proposer
from flashspec.drafters.medusa import MedusaDrafter, MedusaHeads
from flashspec.drafters.model import ModelDrafter
from flashspec.models.base import Features, KVCache
from flashspec.models.hf import HFModel
from flashspec.models.loading import LoadedModel, load_model

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

CUDA = torch.device("cuda:0")
PROMPTS = [[1, 2, 3, 4, 1, 2, 3], [5, 6, 7], [9, 8, 9, 8, 9, 8, 9, 8]]
ARMS = (["plain"], ["ngram:4"], ["suffix:16"], ["early-exit:2"], ["near:3"], ["plain", "ngram:2", "suffix:8", "near:4"])

SAMPLED = {"temperature": 0.8}
PENALTIES = {"repetition_penalty": 1.2, "frequency_penalty": 0.2, "logit_bias": {3: 2.0}}
EVERYTHING = SAMPLED | PENALTIES | {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "logprobs": 2}


def model_of() -> Any:
    shape = {"num_hidden_layers": 4, "head_dim": 64, "max_position_embeddings": 2048, "eos_token_id": None}
    return llama(vocab_size=400, **shape).to(CUDA)


@pytest.fixture(scope="module")
def target() -> Any:
    return model_of()


@pytest.fixture(scope="module")
def near(target: Any) -> ModelDrafter:
    """A copy with noise on its weights, so that it is right now and then."""
    other = model_of()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * parameter.std() * torch.randn_like(parameter)
    return ModelDrafter(load_model(other).model, "near")


def engine_of(
    target: Any, near: ModelDrafter | None, arms: list[str], eager: bool = False, **settings: Any
) -> SpeculativeEngine:
    loaded = target if isinstance(target, LoadedModel) else load_model(target)
    names = {arm.rpartition(":")[0] for arm in arms} - {""}
    drafters = [near if name == "near" else name for name in sorted(names)]
    config = FlashSpecConfig(
        device="cuda", bandit={"strategy": "auto", "seed": 0}, sampling={"temperature": 0.0, **settings}
    )
    engine = SpeculativeEngine(config, drafters, loaded, arms=arms)
    if eager:
        engine.workspaces = None
    return engine


def rows(result: Any) -> list[list[int]]:
    return [[token for token in row if token >= 0] for row in result.output_ids.tolist()]


@torch.inference_mode()
def transformers_greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt], device=CUDA)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("arms", ARMS, ids=str)
def test_greedy_text_is_that_of_transformers_and_of_eager_steps(
    target: Any, near: ModelDrafter, arms: list[str]
) -> None:
    expected = [transformers_greedy(target, prompt, 60) for prompt in PROMPTS]
    engine = engine_of(target, near, arms)
    for _ in range(2):  # the second time nothing is left to capture
        assert rows(engine.generate(PROMPTS, 60)) == expected
        assert [rows(engine.generate([prompt], 60))[0] for prompt in PROMPTS] == expected
    assert rows(engine_of(target, near, arms, eager=True).generate(PROMPTS, 60)) == expected


@pytest.mark.parametrize(
    ("batches", "longest"), [([[prompt] for prompt in PROMPTS], 15), ([PROMPTS[::2]], 7)], ids=["alone", "two-rows"]
)
def test_text_in_bfloat16_has_the_same_bits_with_every_arm(batches: list[list[list[int]]], longest: int) -> None:
    """Where a forward has at most 16 tokens, all rows together; the second time every step is a graph."""
    target, suffix = load_model(model_of().bfloat16()), f"suffix:{longest}"
    plain = engine_of(target, None, ["plain"])
    expected, accepted = [rows(plain.generate(batch, 120)) for batch in batches], 0
    for arms in ([suffix], ["ngram:4"], ["plain", "ngram:4", suffix]):
        engine = engine_of(target, None, arms)
        for _ in range(2):
            results = [engine.generate(batch, 120) for batch in batches]
            assert [rows(result) for result in results] == expected
        accepted += sum(result.acceptance_rate > 0 for result in results)
    assert accepted


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.02},
        {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2, "logit_bias": {3: 2.0}},
    ],
    ids=str,
)
def test_coupled_text_depends_on_the_target_alone(target: Any, near: ModelDrafter, settings: dict[str, Any]) -> None:
    texts = []
    for arms in ARMS:
        engine = engine_of(target, near, arms, variant="coupled", temperature=0.9, seed=5, **settings)
        texts.append(rows(engine.generate(PROMPTS, 40)))
        assert [rows(engine.generate([prompt], 40))[0] for prompt in PROMPTS] == texts[0]
    assert all(text == texts[0] for text in texts)


@pytest.mark.parametrize("arms", ARMS, ids=str)
@pytest.mark.parametrize("settings", [{}, SAMPLED, EVERYTHING], ids=["greedy", "sampled", "everything"])
def test_no_step_synchronises(
    target: Any, near: ModelDrafter, arms: list[str], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_no_step_synchronises(engine_of(target, near, arms, seed=1, **settings), PROMPTS, monkeypatch)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.8, "seed": 3}, {"temperature": 0.8, "seed": 3, "top_k": 20, "repetition_penalty": 1.3}],
    ids=str,
)
def test_log_probabilities_are_those_of_transformers(target: Any, near: ModelDrafter, settings: dict[str, Any]) -> None:
    """Of the raw logits, whatever the settings make of them; the second time every step is a graph."""
    engine = engine_of(target, near, ["plain", "near:3", "ngram:2"], **settings)
    for count in (3, 0, 3):
        result = engine.generate(PROMPTS, 40, logprobs=count)
        assert result.logprobs is not None
        for prompt, text, tokens in zip(PROMPTS, rows(result), result.logprobs, strict=True):
            with torch.inference_mode():
                logits = target(torch.tensor([prompt + text], device=CUDA)).logits[0, len(prompt) - 1 : -1].float()
            expected = logits.log_softmax(-1).cpu()  # (40, V)
            best = expected.topk(count)
            found = torch.tensor([token.logprob for token in tokens])
            assert [token.token_id for token in tokens] == text
            torch.testing.assert_close(found, expected.gather(1, torch.tensor(text)[:, None])[:, 0], rtol=0, atol=1e-3)
            top = torch.tensor([[value for _, value in token.top] for token in tokens])
            torch.testing.assert_close(top, best.values, rtol=0, atol=1e-3)
            assert all(token.logprob == dict(token.top).get(token.token_id, token.logprob) for token in tokens)


class Markov(MarkovModel):
    """On the GPU, without anything that reads back."""

    def __init__(self, table: Tensor) -> None:
        super().__init__(table.to(CUDA), max_context=64)

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        empty = torch.full((1, batch_size, 1, capacity, 1), -1.0, device=CUDA)
        return KVCache(empty, empty.clone())

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cache: KVCache,
        bound: int,
        num_layers: int | None = None,
        features: Features | None = None,
    ) -> Tensor:
        seen = cache.keys[0, :, 0, :, 0]
        seen.scatter_(1, positions, token_ids.float())
        last = seen.gather(1, positions).long()
        before = torch.where(positions > 0, seen.gather(1, (positions - 1).clamp(min=0)).long(), 0)
        hidden = torch.stack([before if num_layers is None else before * 0, last], -1).float()
        for layer in features.layers if features else ():
            features.record(layer, positions, hidden)
        return hidden


def medusa_of(vocab_size: int) -> MedusaDrafter:
    """Random heads that know all tokens but one, over what they are told of the text."""
    generator = torch.Generator().manual_seed(6)
    block = torch.randn(3, 2, 2, generator=generator), torch.randn(3, 2, generator=generator)
    scores = 0.5 * torch.randn(3, vocab_size - 1, 2, generator=generator)
    known = torch.arange(1, vocab_size)
    heads = MedusaHeads(((block[0].to(CUDA), block[1].to(CUDA)),), 2, scores.to(CUDA), part=known.to(CUDA))
    return MedusaDrafter(heads)


@pytest.mark.parametrize(
    ("variant", "settings"),
    [("rejection", {}), ("rejection", {"temperature": 0.6, "top_k": 4}), ("coupled", {"repetition_penalty": 1.5})],
    ids=str,
)
def test_a_heads_tuples_follow_the_targets_joint_distribution(variant: str, settings: dict[str, Any]) -> None:
    """10,000 rows in one batch, every step of which the head drafts."""
    table, prompt = MarkovModel.random(6, seed=3).table, [1, 2, 1, 2, 1]
    sampling = SamplingConfig(variant=variant, seed=7, **settings)
    config = FlashSpecConfig(device="cuda", sampling=sampling)
    engine = SpeculativeEngine(config, [medusa_of(6)], LoadedModel(Markov(table), None, (), "t"), arms=["medusa:3"])
    result = engine.generate([prompt] * 10_000, 3)
    exact = joint_distribution(lambda text: MarkovModel(table).next_logits(text), sampling, prompt, 3, 6)
    assert g_test(torch.tensor(rows(result)), exact) > 0.01 / 3
    assert 0.05 < result.acceptance_rate < 0.95


@pytest.mark.parametrize("variant", ["rejection", "coupled"])
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.6}, {"top_k": 4, "top_p": 0.9}, {"repetition_penalty": 1.5}], ids=str
)
def test_tuples_follow_the_targets_joint_distribution(variant: str, settings: dict[str, Any]) -> None:
    """10,000 rows in one batch, arms mixed by the adaptive selector."""
    table = MarkovModel.random(6, seed=3).table
    target, near = Markov(table), Markov(table + 0.7 * MarkovModel.random(6, seed=4).table)
    arms = ["plain", "near:1", "near:3", "ngram:2", "early-exit:2"]
    config = SamplingConfig(variant=variant, seed=7, **settings)
    engine = engine_of(LoadedModel(target, None, (), "t"), ModelDrafter(near, "near"), arms, **config.model_dump())
    prompt = [1, 2, 1, 2, 1]
    texts = torch.tensor(rows(engine.generate([prompt] * 10_000, 3)))
    cpu = MarkovModel(table)
    exact = joint_distribution(lambda text: cpu.next_logits(text), config, prompt, 3, 6)
    assert g_test(texts, exact) > 0.01 / 8


class Spoilt(Drafter):
    """Drafts from NaN after a while, inside the graph."""

    name = "spoilt"

    def start(self, context: DraftContext) -> Proposer:
        class Proposes(Proposer):
            def propose(self, context: DraftContext, length: int) -> Draft:
                token_ids = context.tokens.gather(1, context.lengths[:, None] - 1).expand(-1, length).contiguous()
                sound = context.lengths < 20
                return Draft(token_ids, sound * length, None, ~sound)

        return Proposes()


def test_a_drafter_that_fails_inside_a_graph_is_set_aside(target: Any, near: ModelDrafter) -> None:
    expected = [transformers_greedy(target, prompt, 40) for prompt in PROMPTS]
    config, arms = FlashSpecConfig(device="cuda", sampling={"temperature": 0.0}), ["plain", "spoilt:2", "near:2"]
    engine = SpeculativeEngine(config, [Spoilt(), near], load_model(target), TakingTurns(3), arms=arms)
    with pytest.warns(RuntimeWarning, match="'spoilt' is set aside"):
        assert rows(engine.generate(PROMPTS, 40)) == expected
    with pytest.warns(RuntimeWarning, match="'spoilt' is set aside"):
        assert rows(engine.generate(PROMPTS, 40)) == expected


class Poisoned(Markov):
    """NaN in the logits after token 5, for every row that writes it."""

    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(hidden).masked_fill((hidden[..., 1] == 5)[..., None], float("nan"))


def test_a_nan_row_ends_alone() -> None:
    table = MarkovModel.random(6, seed=3).table
    table[3, 1, 5] = 90.0  # after 3, 1 comes 5
    prompts = [[1, 2, 1], [2, 3, 1], [4, 4]]
    near = ModelDrafter(Markov(table), "near")
    for arms in (["plain"], ["near:3"]):
        engine = engine_of(LoadedModel(Poisoned(table), None, (), "t"), near, arms)
        plain = engine_of(LoadedModel(Markov(table), None, (), "t"), near, arms, eager=True)
        result, expected = engine.generate(prompts, 12), rows(plain.generate(prompts, 12))
        for found, text, reason in zip(rows(result), expected, result.finish_reasons, strict=True):
            end = text.index(5) + 1 if 5 in text else 12
            assert found == text[:end] and reason == ("error" if 5 in text[:11] else "length")
        assert "error" in result.finish_reasons
        assert rows(engine.generate(prompts[:1], 12)) == rows(result)[:1]


OTHERS = {
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=400, n_embd=64, n_layer=3, n_head=4, n_positions=512)),
    "gpt-neox": lambda: tf.GPTNeoXForCausalLM(
        tf.GPTNeoXConfig(
            vocab_size=400,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=512,
        )
    ),
    "gemma2": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(
            vocab_size=400,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            sliding_window=32,
            max_position_embeddings=512,
        )
    ),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("arms", [["plain"], ["ngram:4", "suffix:8", "early-exit:2"]], ids=str)
def test_other_models_are_captured_through_the_adapter(name: str, arms: list[str]) -> None:
    model = randomised(OTHERS[name]()).to(CUDA)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    expected = [transformers_greedy(model, prompt, 60) for prompt in PROMPTS]
    engine = engine_of(model, None, arms)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # what cannot be captured warns
        for _ in range(2):
            assert rows(engine.generate(PROMPTS, 60)) == expected


def is_graph(work: Any) -> bool:
    return isinstance(getattr(work, "__self__", None), torch.cuda.CUDAGraph)


class Asking(Drafter):
    """Has the host read a value in the middle of a draft."""

    name = "asking"

    def start(self, context: DraftContext) -> Proposer:
        class Proposes(Proposer):
            def propose(self, context: DraftContext, length: int) -> Draft:
                last = int(context.lengths.max().item()) - 1
                return Draft(
                    context.tokens[:, last : last + 1].expand(-1, length).contiguous(), context.lengths * 0 + 1
                )

        return Proposes()


@pytest.mark.filterwarnings("ignore:.*without a CUDA graph")
def test_a_step_that_synchronises_is_found(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = FlashSpecConfig(device="cuda", sampling={"temperature": 0.0})
    engine = SpeculativeEngine(config, [Asking()], load_model(target), TakingTurns(2), arms=["plain", "asking:2"])
    with pytest.raises((RuntimeError, RuntimeWarning), match="synchroniz"):
        assert_no_step_synchronises(engine, PROMPTS, monkeypatch)


def test_other_arms_are_captured_beside_one_with_host_logic(target: Any, near: ModelDrafter) -> None:
    config, arms = FlashSpecConfig(device="cuda", sampling={"temperature": 0.0}), ["plain", "asking:2", "near:2"]
    engine = SpeculativeEngine(config, [Asking(), near], load_model(target), TakingTurns(3), arms=arms)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph") as told:
        assert rows(engine.generate(PROMPTS, 40)) == [transformers_greedy(target, prompt, 40) for prompt in PROMPTS]
    assert [each.category for each in told].count(RuntimeWarning) == 1
    (workspace,) = engine.workspaces._kept.values()
    refused = [key[1].drafter for key, work in workspace._captured.items() if not is_graph(work)]
    assert refused == ["asking"] and len(workspace._captured) > 3
    torch.cuda.empty_cache()


@pytest.mark.parametrize("length", [17, 100, 200, 256, 300, 700])
def test_prompts_are_read_by_graphs(target: Any, length: int) -> None:
    """Up to 512 tokens, of one row or two; what is longer runs as it is."""
    generator = torch.Generator().manual_seed(length)
    prompts = torch.randint(3, 400, (2, length), generator=generator).tolist()
    prompts[1] = prompts[1][: length // 2]
    expected = [transformers_greedy(target, prompt, 20) for prompt in prompts]
    engine = engine_of(target, None, ["plain", "ngram:4"])
    for batch, texts in ((prompts[:1], expected[:1]), (prompts, expected)):
        for _ in range(2):
            assert rows(engine.generate(batch, 20)) == texts
    for workspace in engine.workspaces._kept.values():
        assert all(is_graph(workspace._captured[f"catch up 0 by {size}"]) for size in (16, 128, 256))


def test_texts_of_a_batch_in_bfloat16_part_only_at_near_ties() -> None:
    """Beyond 16 tokens a forward sums are in another order than one row's alone."""
    model = model_of().bfloat16()
    exact = copy.deepcopy(model).float()
    target = load_model(model)
    prompts = [[3 + (7 * row + 5 * place) % 390 for place in range(6 + row)] * 2 for row in range(8)]
    plain = engine_of(target, None, ["plain"])
    alone = [rows(plain.generate([prompt], 100))[0] for prompt in prompts]
    for arms in (["plain"], ["ngram:4"], ["plain", "ngram:4", "suffix:15"]):
        together = rows(engine_of(target, None, arms).generate(prompts, 100))
        for prompt, text, other in zip(prompts, alone, together, strict=True):
            parting = next((place for place in range(100) if text[place] != other[place]), None)
            if parting is None:
                continue
            ids = torch.tensor([[*prompt, *text[:parting]]], device=CUDA)
            with torch.no_grad():
                rounded, precise = (one(ids, use_cache=False).logits[0, -1].float() for one in (model, exact))
            margin = (precise[text[parting]] - precise[other[parting]]).abs()
            assert margin <= 4 * (rounded - precise).abs().max(), (arms, parting)


class Late(TakingTurns):
    """The first arm forty times, then the last."""

    def _choose(self, arms: Sequence[int]) -> int:
        return arms[0 if self._n_selected < 40 else -1]


def test_a_drafter_far_behind_catches_up_by_one_graph(target: Any, near: ModelDrafter) -> None:
    engine = engine_of(target, near, ["plain", "near:4"])
    engine.generate([[1, 2, 3, 4]], 4)
    (workspace,) = engine.workspaces._kept.values()
    cached, read = workspace.state.readers[1].cached, []

    def counting(graph: Any) -> Callable[[], None]:
        assert is_graph(graph)

        def replay() -> None:
            before = cached.clone()
            graph()
            read.append(int((cached - before)[0]))

        return replay

    for key in ("catch up 1 by 16", "catch up 1 by 128"):
        workspace._captured[key] = counting(workspace._captured[key])
    engine.selector = Late(2)
    assert rows(engine.generate([[1, 2, 3, 4]], 60))[0] == transformers_greedy(target, [1, 2, 3, 4], 60)
    assert len(read) == 1 and read[0] > 32


ADAPTED = OTHERS | {
    "mistral": lambda: tf.MistralForCausalLM(
        tf.MistralConfig(
            vocab_size=400,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=128,
            sliding_window=100,
            max_position_embeddings=512,
        )
    ),
}
WINDOWS = {"gpt2": (None,) * 3, "gpt-neox": (None,) * 3, "gemma2": (32, None, 32, None), "mistral": (100,) * 3}


@torch.no_grad()
def eager_logits(model: Any, token_ids: Tensor) -> Tensor:
    model.set_attn_implementation("eager")
    return model(token_ids, use_cache=False).logits.float()


@pytest.mark.parametrize("queries", [1, 5, 25, 128, 200], ids="q{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ADAPTED)
def test_the_adapters_kernel_is_as_near_as_transformers(name: str, dtype: torch.dtype, queries: int) -> None:
    model = randomised(ADAPTED[name]()).to(CUDA, dtype)
    lm = HFModel(model)
    assert lm._windows == WINDOWS[name]
    ids = torch.randint(3, 400, (3, 350), generator=torch.Generator().manual_seed(2)).to(CUDA)
    exact, theirs = eager_logits(copy.deepcopy(model).float(), ids), eager_logits(model, ids)
    rounding = (theirs - exact).norm() / exact.norm()
    cache, everywhere = lm.new_cache(3, 350), torch.arange(350, device=CUDA).expand(3, -1)
    starts = torch.tensor([[4], [126], [300]] if queries < 50 else [[4], [60], [129]], device=CUDA)
    positions = torch.empty_like(everywhere[:, :queries])
    token_ids = torch.empty_like(positions)

    def place(moved: int) -> Tensor:
        lm.forward(ids, everywhere, cache, 350)  # by PyTorch: too many
        positions.copy_(starts + moved + torch.arange(queries, device=CUDA))
        token_ids.copy_(ids.gather(1, positions))
        for row, first in enumerate(positions[:, 0].tolist()):  # nothing behind the text may be read
            cache.keys[:, row, :, first:] = cache.values[:, row, :, first:] = float("nan")
        return exact.gather(1, positions[..., None].expand(-1, -1, 400))

    def step() -> Tensor:
        return lm.logits(lm.forward(token_ids, positions, cache, 350))

    def assert_near(logits: Tensor, expected: Tensor) -> None:
        assert (logits - expected).norm() / expected.norm() < (1e-4 if dtype == torch.float32 else 2 * rounding)

    expected = place(0)
    assert_near(step(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for moved in (0, 3, 20):
        expected = place(moved)
        graph.replay()
        assert_near(captured, expected)
