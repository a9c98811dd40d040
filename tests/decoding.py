"""Short ways to decode with the fakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fakes import MarkovModel, ScriptedDrafter
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from flashspec.bandit import DraftSelector
from flashspec.config import FlashSpecConfig, SamplingConfig
from flashspec.core import Arm
from flashspec.drafters.base import Drafter
from flashspec.drafters.early_exit import EarlyExitDrafter
from flashspec.drafters.host import HostDrafter
from flashspec.drafters.model import ModelDrafter
from flashspec.drafters.ngram import NgramDrafter
from flashspec.drafters.suffix import SuffixDrafter
from flashspec.engine import SpeculativeEngine
from flashspec.engine.loop import Run
from flashspec.engine.state import DecodeState
from flashspec.models.base import Features, KVCache
from flashspec.models.loading import LoadedModel
from flashspec.models.tokenizer import Tokenizer
from flashspec.sampling.sampler import make_sampler

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


class Reciter:
    """Writes `script`: after the token at text position i it is sure of script[i + 1], whatever it has read.

    reads: how many tokens it has been fed. script must be as long as the longest text.
    """

    def __init__(self, script: Sequence[int], vocab_size: int, max_context: int = 512) -> None:
        self.script = torch.tensor([*script, *[0] * (max_context + 1 - len(script))])
        self.vocab_size = vocab_size
        self.hidden_size = 1
        self.max_context = max_context
        self.num_layers = 2
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.reads = 0

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        return KVCache(torch.zeros(1, batch_size, 1, capacity, 1), torch.zeros(1, batch_size, 1, capacity, 1))

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cache: KVCache,
        bound: int,
        num_layers: int | None = None,
        features: Features | None = None,
    ) -> Tensor:
        self.reads += token_ids.shape[1]
        return positions[..., None].float()

    def logits(self, hidden: Tensor) -> Tensor:
        following = self.script[hidden[..., 0].long() + 1]
        return 40.0 * torch.nn.functional.one_hot(following, self.vocab_size).float()

    def drafter(self) -> ScriptedDrafter:
        """Knows the script, so that every draft is accepted whole."""
        return ScriptedDrafter(lambda text, length: self.script[len(text) : len(text) + length].tolist())


class TakingTurns(DraftSelector):
    """Every enabled arm in turn."""

    def _choose(self, arms: Sequence[int]) -> int:
        return arms[self._n_selected % len(arms)]

    def _options(self) -> dict[str, Any]:
        return {"n_arms": self.n_arms, "window_size": self.window_size}


class UniformSource:
    """Only has generate_draft; what it proposes has nothing to do with the text."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def generate_draft(self, input_ids: Tensor, gamma: int) -> tuple[Tensor, Tensor]:
        ids = (input_ids[:, -1:] + torch.arange(1, gamma + 1)) % self.vocab_size
        return ids, torch.zeros(1, gamma, self.vocab_size).log_softmax(-1)


def every_drafter(target: MarkovModel, seed: int = 12) -> dict[str, Drafter]:
    """One of each kind; the model is near enough to the target to be right now and then."""
    near = MarkovModel(target.table + 0.7 * MarkovModel.random(target.vocab_size, seed).table, target.max_context)
    return {
        "ngram": NgramDrafter(),
        "suffix": SuffixDrafter(),
        "model": ModelDrafter(near),
        "early-exit": EarlyExitDrafter(1),
        "host": HostDrafter(UniformSource(target.vocab_size), "host"),
    }


EVERY_ARM = ("plain", "ngram:3", "suffix:4", "model:1", "model:4", "early-exit:2", "host:2")


def open_run(
    target: Any,
    prompts: Sequence[Sequence[int]],
    arms: Sequence[str],
    drafters: Mapping[str, Drafter],
    count: int | Sequence[int],
    *,
    seed: int = 1,
    lag: int = 0,
    stop_ids: Sequence[int] = (),
    selector: DraftSelector | None = None,
    **settings: Any,
) -> Run:
    """count: tokens to write, of every row or each."""
    counts = [count] * len(prompts) if isinstance(count, int) else count
    config = SamplingConfig(**settings)
    sampler = make_sampler(config, prompts, stop_ids, target.vocab_size, seed, target.device)
    limits = [len(prompt) + n for prompt, n in zip(prompts, counts, strict=True)]
    state = DecodeState.create(prompts, limits, stop_ids, target, sampler, config.logprobs)
    return Run(state, [Arm.parse(arm) for arm in arms], selector or TakingTurns(len(arms)), drafters, lag)


def decode(target: Any, prompts: Sequence[Sequence[int]], *arguments: Any, **settings: Any) -> list[list[int]]:
    """What `open_run` writes: the new tokens of every row."""
    rows: list[list[int]] = [[] for _ in prompts]
    for output in open_run(target, prompts, *arguments, **settings):
        for row in output.rows:
            rows[row] += output.news.token_ids[row]
    return rows


def engine_of(
    target: Any,
    drafters: Sequence[Any] = (),
    arms: Sequence[str] | None = None,
    *,
    bandit: DraftSelector | None = None,
    tokenizer: Tokenizer | None = None,
    eos: Sequence[int] = (),
    **sampling: Any,
) -> SpeculativeEngine:
    """Greedy unless `sampling` says otherwise; the arms take turns."""
    config = FlashSpecConfig(device="cpu", sampling=SamplingConfig(**{"temperature": 0.0, **sampling}))
    n_arms = len(arms) if arms is not None else max(1, len(drafters))
    loaded = LoadedModel(target, tokenizer, tuple(eos), "target")
    return SpeculativeEngine(config, drafters, loaded, bandit or TakingTurns(n_arms), arms=arms)


def byte_tokenizer() -> Tokenizer:
    """One token a byte, with the byte's value as its id."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    backend = Backend(models.BPE({letter: byte for byte, letter in letters.items()}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, {}, CHAT_TEMPLATE)


def recite(text: str, prompt: str = ">", **options: Any) -> tuple[Reciter, SpeculativeEngine]:
    """A target that answers `prompt` with `text`, and an engine over bytes whose drafter 'scripted' knows it."""
    target = Reciter([*prompt.encode(), *text.encode()], 256)
    arms = options.pop("arms", ["scripted:4"])
    return target, engine_of(target, [target.drafter()], arms, tokenizer=byte_tokenizer(), **options)
