"""The output follows the target's own joint distribution, whatever drafts and however the arms are switched.

Every case decodes 10,000 rows or more and compares the tuples that came out with the exact joint probabilities (G-test,
alpha = 0.01 over the whole family, Bonferroni). Seeds are fixed, so a failure is a change of the code.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from fakes import MarkovModel, ScriptedDrafter
from scipy import stats
from small_models import decoder_of
from statistics_of_text import g_test, joint_distribution
from torch import Tensor

import flashspec.sampling.sampler as sampler_module
from flashspec.bandit import DraftSelector, make_selector
from flashspec.config import SamplingConfig
from flashspec.core import Arm, Draft, Verdict
from flashspec.drafters.base import Drafter
from flashspec.drafters.eagle import EagleDrafter, EagleHead, Fusion
from flashspec.drafters.early_exit import EarlyExitDrafter
from flashspec.drafters.host import HostDrafter
from flashspec.drafters.medusa import MedusaDrafter, MedusaHeads
from flashspec.drafters.model import ModelDrafter
from flashspec.drafters.ngram import NgramDrafter
from flashspec.drafters.suffix import SuffixDrafter
from flashspec.engine.loop import Run
from flashspec.engine.state import DecodeState
from flashspec.kernels import verify_logits
from flashspec.models.decoder import DecoderConfig
from flashspec.sampling.sampler import Sampler, make_sampler

ROWS = 12_000
ALPHA = 0.01
PROMPT = [1, 2, 1, 2, 1]
NEVER = float("-inf")


class RandomSelector(DraftSelector):
    """Switches arms at every step, whatever happens."""

    def __init__(self, n_arms: int, window_size: int = 500) -> None:
        super().__init__(n_arms, window_size)
        self._random = random.Random(7)

    def _choose(self, arms: Sequence[int]) -> int:
        return self._random.choice(list(arms))

    def _options(self) -> dict[str, object]:
        return {"n_arms": self.n_arms}


class GivingWay(RandomSelector):
    gives_way = True


def target_and_drafter(kind: str, vocab_size: int) -> tuple[MarkovModel, MarkovModel]:
    target = MarkovModel.random(vocab_size, seed=11)
    draft = MarkovModel.random(vocab_size, seed=12)
    if kind == "nearly equal":
        draft = MarkovModel(target.table + 0.05 * draft.table)
    elif kind == "equal":
        draft = MarkovModel(target.table.clone())
    elif kind == "disjoint":
        target.table[..., ::2] = NEVER
        draft.table[..., 1::2] = NEVER
    elif kind == "peaked":
        draft = MarkovModel(40 * draft.table)
    return target, draft


class ReversedDrafter:
    """Only has generate_draft: each token drawn from its own distribution, which ignores the text."""

    def __init__(self, vocab_size: int) -> None:
        self.logprobs = torch.linspace(0, 2, vocab_size).log_softmax(-1)
        self.generator = torch.Generator().manual_seed(3)

    def generate_draft(self, input_ids: torch.Tensor, gamma: int) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = torch.multinomial(self.logprobs.exp(), gamma, replacement=True, generator=self.generator)
        return drawn[None], self.logprobs.expand(1, gamma, -1)


class CertainDrafter:
    """Only has generate_draft, which says no log-probabilities: the text's last token again."""

    def generate_draft(self, input_ids: torch.Tensor, gamma: int) -> tuple[torch.Tensor, None]:
        return input_ids[:, -1:].expand(-1, gamma), None


class Trimmed(MarkovModel):
    """Scores only the tokens of `part` (V',)."""

    def __init__(self, model: MarkovModel, part: Tensor) -> None:
        super().__init__(model.table)
        self.part = part

    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(hidden)[..., self.part]


def trimmed_drafters(draft: MarkovModel) -> dict[str, Drafter]:
    """One of each kind that knows every other token. Medusa's blocks add nothing to what the target records."""
    part = torch.arange(0, draft.vocab_size, 2)
    model, blocks = Trimmed(draft, part), (torch.zeros(3, 2, 2), torch.zeros(3, 2))
    medusa = MedusaHeads((blocks,), 2, score=model.logits, part=part)
    return {
        "trimmed": ModelDrafter(model, "trimmed", part),
        "medusa": MedusaDrafter(medusa),
        "eagle": EagleDrafter(random_eagle(draft.vocab_size, part), "eagle"),
    }


def random_eagle(vocab_size: int, part: Tensor) -> EagleHead:
    generator = torch.Generator().manual_seed(9)

    def normal(*shape: int) -> Tensor:
        return 0.5 * torch.randn(*shape, generator=generator)

    waves, sizes = tuple(0.5**i for i in range(4)), (vocab_size, 16, 16, 2, 1, 8)
    model = decoder_of(DecoderConfig(*sizes, max_context=512, norm_eps=1e-5, inv_freq=waves, windows=(None,)), normal)
    layer = replace(model.weights.layers[0], qkv=normal(32, 32))
    weights = replace(model.weights, layers=(layer,), lm_head=normal(len(part), 16))
    return EagleHead(model.config, weights, Fusion((1,), normal(16, 2), 1 + normal(16), part))


def make_drafters(draft: MarkovModel) -> dict[str, Drafter]:
    vocab_size = draft.vocab_size
    return {
        "model": ModelDrafter(draft),
        **trimmed_drafters(draft),
        "ngram": NgramDrafter(),
        "suffix": SuffixDrafter(),
        "early-exit": EarlyExitDrafter(1),
        "host": HostDrafter(ReversedDrafter(vocab_size), "host"),
        "certain": HostDrafter(CertainDrafter(), "certain"),
        "mute": ScriptedDrafter(lambda text, n: [], "mute"),
        "scripted": ScriptedDrafter(lambda text, n: [(text[-1] + 1) % vocab_size] * (len(text) % (n + 1))),
    }


@dataclass(frozen=True)
class Case:
    name: str
    arms: tuple[str, ...]
    settings: dict[str, object] = field(default_factory=dict)
    kind: str = "random"
    vocab_size: int = 5
    count: int = 3
    selector: str = "random"
    lag: int = 0
    rows: int = ROWS


KINDS = ("random", "nearly equal", "equal", "disjoint", "peaked")
MIXED = ("plain", "model:1", "model:3", "ngram:2", "suffix:4", "early-exit:2", "scripted:3")
TRANSFORMS: dict[str, dict[str, object]] = {
    "hot": {"temperature": 1.7},
    "cuts": {"top_k": 3, "top_p": 0.9, "min_p": 0.05},
    "bias": {"logit_bias": {0: 1.5, 3: -2.0}},
    "penalties": {"presence_penalty": 1.0, "repetition_penalty": 1.5},
    "coupled": {"variant": "coupled"},
}
HEADS = ("plain", "trimmed:3", "medusa:2", "eagle:3", "trimmed:1", "eagle:1")
CASES = [
    Case("plain", ("plain",)),
    *(Case(f"model {kind}", ("model:2",), kind=kind) for kind in KINDS),
    *(Case(f"model gamma {gamma}", (f"model:{gamma}",), count=4, vocab_size=4) for gamma in (1, 3, 4)),
    Case("wide vocabulary", ("model:2",), vocab_size=16, count=2),
    *(Case(f"temperature {t}", ("model:3",), {"temperature": t}) for t in (0.3, 1.7)),
    Case("greedy", MIXED, {"temperature": 0.0}),
    Case("top-k", MIXED, {"top_k": 3}),
    Case("top-p", MIXED, {"top_p": 0.7}),
    Case("min-p", MIXED, {"min_p": 0.2}),
    Case("everything at once", MIXED, {"top_k": 4, "top_p": 0.9, "min_p": 0.05, "temperature": 1.3}),
    Case("repetition penalty", MIXED, {"repetition_penalty": 1.8}),
    Case("presence and frequency", MIXED, {"presence_penalty": 1.0, "frequency_penalty": 0.7}),
    Case("logit bias", MIXED, {"logit_bias": {0: 1.5, 3: -2.0}}),
    *(Case(f"drafter {name}", (arm,)) for name, arm in (("ngram", "ngram:3"), ("suffix", "suffix:4"))),
    *(Case(f"drafter {name}", (arm,)) for name, arm in (("early exit", "early-exit:3"), ("scripted", "scripted:3"))),
    *(Case(f"trimmed {kind}", ("trimmed:2",), kind=kind) for kind in KINDS),
    *(Case(f"trimmed heads, {name}", HEADS, settings) for name, settings in TRANSFORMS.items()),
    *(Case(f"trimmed {arm}", (arm,), count=4, vocab_size=4) for arm in ("medusa:3", "eagle:1", "eagle:4")),
    Case("drafter with generate_draft", ("host:2",), rows=10_000),
    Case("drafter with generate_draft, certain", ("certain:2",), rows=10_000),
    Case("arms at random", MIXED, count=4, vocab_size=4),
    Case("arms adaptively", MIXED, count=4, vocab_size=4, selector="thompson"),
    Case("arms that give way", ("mute:2", "model:3", "scripted:2"), count=4, vocab_size=4, selector="giving way"),
    Case("arms by auto", MIXED, count=4, vocab_size=4, selector="auto"),
    Case("feedback one step late", MIXED, count=4, vocab_size=4, selector="thompson", lag=1),
    *(
        Case(f"coupled {kind}", MIXED, {"variant": "coupled"}, kind=kind)
        for kind in ("random", "nearly equal", "disjoint", "peaked")
    ),
    Case("coupled with transforms", MIXED, {"variant": "coupled", "top_k": 4, "top_p": 0.9, "presence_penalty": 1.0}),
]


def decode(case: Case) -> tuple[torch.Tensor, MarkovModel, SamplingConfig]:
    """(rows, count) tokens; each row runs a few tokens further, so that drafts cross the tuple's end."""
    target, draft = target_and_drafter(case.kind, case.vocab_size)
    config = SamplingConfig(**{"temperature": 1.0, **case.settings})
    arms = [Arm.parse(name) for name in case.arms]
    prompts = [PROMPT] * case.rows
    sampler = make_sampler(config, prompts, [], case.vocab_size, 1000, target.device)
    limits = [len(PROMPT) + case.count + 2] * case.rows
    state = DecodeState.create(prompts, limits, [], target, sampler)
    selector = make(case.selector, arms)
    for _ in Run(state, arms, selector, make_drafters(draft), lag=case.lag):
        pass
    texts = torch.tensor([text[len(PROMPT) :] for text in state.texts])
    return texts[:, : case.count], target, config


def make(strategy: str, arms: Sequence[Arm]) -> DraftSelector:
    if strategy in ("random", "giving way"):
        return (RandomSelector if strategy == "random" else GivingWay)(len(arms))
    named = [(arm.drafter, arm.length) for arm in arms]
    return make_selector(strategy, len(arms), seed=5, arms=named, seconds=[1.0] * len(arms))


def p_value(case: Case) -> float:
    texts, target, config = decode(case)
    exact = joint_distribution(target.next_logits, config, PROMPT, case.count, case.vocab_size)
    return g_test(texts, exact)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tuples_follow_the_targets_joint_distribution(case: Case) -> None:
    assert p_value(case) > ALPHA / len(CASES)


def test_kolmogorov_smirnov_gate() -> None:
    """10,000 first tokens against the target's distribution, alpha = 0.01."""
    texts, target, _ = decode(Case("gate", ("model:4",), vocab_size=16, count=1, rows=10_000))
    cumulative = target.next_logprobs(PROMPT).double().exp().cumsum(0)
    observed = torch.bincount(texts[:, 0], minlength=16).cumsum(0) / len(texts)
    distance = float((observed - cumulative).abs().max())
    assert distance < stats.kstwobign.isf(ALPHA) / len(texts) ** 0.5


def keeps_tokens_after_a_rejection(target, token_ids, draft_lengths, *rest):  # type: ignore[no-untyped-def]
    num_accepted, next_token, failed = verify_logits(target, token_ids, draft_lengths, *rest)
    return torch.where(num_accepted > 0, draft_lengths, num_accepted), next_token, failed


def overwrites_the_last_accepted_token(*arguments):  # type: ignore[no-untyped-def]
    num_accepted, next_token, failed = verify_logits(*arguments)
    return (num_accepted - 1).clamp(min=0), next_token, failed


def forgets_to_renormalise(target, token_ids, draft_lengths, draft, *rest):  # type: ignore[no-untyped-def]
    """Inverts the distribution function of max(0, p - q) as if it summed to 1."""
    num_accepted, next_token, failed = verify_logits(target, token_ids, draft_lengths, draft, *rest)
    rows, last = torch.arange(len(target)), num_accepted.clamp(max=token_ids.shape[1] - 1)
    residual = (target[rows, last].softmax(-1) - draft[rows, last].softmax(-1)).clamp(min=0)
    u = torch.rand(len(target), 1, generator=torch.Generator().manual_seed(1))
    drawn = (residual.cumsum(-1) <= u).sum(-1).clamp(max=target.shape[-1] - 1)
    return num_accepted, torch.where(num_accepted < draft_lengths, drawn, next_token), failed


@pytest.mark.parametrize(
    "wrong", [keeps_tokens_after_a_rejection, overwrites_the_last_accepted_token, forgets_to_renormalise]
)
def test_wrong_verifiers_are_caught(wrong, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(sampler_module, "verify_logits", wrong)
    assert p_value(Case("wrong", ("model:3",))) < 1e-9


def gives_mass_to_what_is_never_drafted(draft, offset, part):  # type: ignore[no-untyped-def]
    weights = draft.logits[:, offset]
    outside = [token for token in range(weights.shape[1]) if token not in part]
    weights[:, outside] = weights.amax(1, keepdim=True)


def forgets_to_map_back(draft, offset, part):  # type: ignore[no-untyped-def]
    draft.token_ids[:, offset] = (part == draft.token_ids[:, offset, None]).long().argmax(1)


@pytest.mark.parametrize("wrong", [gives_mass_to_what_is_never_drafted, forgets_to_map_back])
@pytest.mark.parametrize("arm", ["trimmed:3", "medusa:3", "eagle:3"])
def test_wrong_trimmed_drafts_are_caught(arm: str, wrong, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    right = Sampler.draw

    def draw(self, logits, draft, offset, lengths, vocab_size, part, least):  # type: ignore[no-untyped-def]
        right(self, logits, draft, offset, lengths, vocab_size, part, least)
        wrong(draft, offset, part)

    monkeypatch.setattr(Sampler, "draw", draw)
    assert p_value(Case("wrong", (arm,))) < 1e-9


def verdict_of(weights: Tensor, draft: Draft) -> Verdict:
    rows = len(weights)
    lengths, heat = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
    arguments = (weights, draft.token_ids, draft.lengths, draft.logits, torch.arange(rows), lengths, heat)
    return Verdict(*verify_logits(*arguments, "rejection")[:2])


def one_step(kind: str = "random", gamma: int = 3, rows: int = 20_000):  # type: ignore[no-untyped-def]
    """A verdict over many rows of one position's distributions, with drafts drawn from q."""
    vocab_size = 6
    generator = torch.Generator().manual_seed(4)
    target_logits = torch.randn(gamma + 1, vocab_size, generator=generator)
    draft_logits = torch.randn(gamma, vocab_size, generator=generator)
    drawn = torch.stack(
        [torch.multinomial(row.softmax(-1), rows, replacement=True, generator=generator) for row in draft_logits], 1
    )
    draft = Draft(drawn, torch.full((rows,), gamma), draft_logits.expand(rows, -1, -1))
    weights = target_logits.expand(rows, -1, -1)
    verdict = verdict_of(weights, draft)
    return target_logits.softmax(-1).double(), draft_logits.softmax(-1).double(), draft, verdict


def test_expected_acceptance_is_the_overlap() -> None:
    target_probs, draft_probs, _, verdict = one_step()
    overlap = torch.minimum(target_probs[:3], draft_probs).sum(-1)  # (γ,)
    expected = float(overlap.cumprod(0).sum())
    sampled = verdict.num_accepted.double()
    assert abs(float(sampled.mean()) - expected) < 4 * float(sampled.std()) / len(sampled) ** 0.5


def test_the_token_after_a_rejection_follows_the_residual() -> None:
    target_probs, draft_probs, _, verdict = one_step()
    residual = (target_probs[0] - draft_probs[0]).clamp(min=0)
    rejected = verdict.next_token[verdict.num_accepted == 0]
    assert g_test(rejected[:, None], residual / residual.sum()) > ALPHA


def test_the_bonus_token_follows_the_target() -> None:
    target_probs, _, _, verdict = one_step()
    bonus = verdict.next_token[verdict.num_accepted == 3]
    assert g_test(bonus[:, None], target_probs[3]) > ALPHA


def test_a_one_hot_target_accepts_everything_that_agrees() -> None:
    weights = torch.full((2, 3, 4), NEVER)
    weights[..., 2] = 0.0
    draft = Draft(torch.tensor([[2, 2], [2, 1]]), torch.tensor([2, 2]))
    verdict = verdict_of(weights, draft)
    assert verdict.num_accepted.tolist() == [2, 1]
    assert verdict.next_token.tolist() == [2, 2]
