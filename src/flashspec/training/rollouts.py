"""Texts that the target wrote, as token ids in a folder of shards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from flashspec.config import FlashSpecConfig, MetricsConfig, SamplingConfig
from flashspec.core import FlashSpecError
from flashspec.engine import SpeculativeEngine
from flashspec.training.files import read_tensors, write_tensors
from flashspec.training.prompts import Prompt, file_prompts, own_prompts
from flashspec.training.settings import Progress, Settings
from flashspec.training.target import Target

HELD_OUT = 16  # every 16th prompt is kept from training, up to MOST_HELD_OUT of them
MOST_HELD_OUT = 256
ANSWERS = (0.0, 0.7)  # the temperatures of the answers; held-out ones are greedy
SILENT = 3  # batches without a finite logit, behind which there will be none
SHORTEST = 4  # tokens written, below which a text teaches nothing
SHARD_TOKENS, SHARD_SECONDS = 16384, 5.0  # what a shard collects, whichever comes first: a kill loses no more
STRAGGLERS = 0.25  # of a batch: when only so many of its texts go on, they are cut, as a step costs what it did for all
Clock = Callable[[], float]
Text = tuple[Prompt, Prompt, bool]  # the prompt, what was written, whether it is held out


@dataclass(frozen=True, slots=True)
class Rollouts:
    """n texts. Held-out ones are greedy, so that a greedy draft can be checked against the text itself."""

    token_ids: Tensor  # (all tokens,) int32, one text behind the other
    offsets: Tensor  # (n + 1,) int64
    starts: Tensor  # (n,) int64, where in a text the target's own writing begins
    held_out: Tensor  # (n,) bool

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> Tensor:
        return self.offsets.diff()

    def written(self, index: int) -> Tensor:
        begin = self.offsets[index] + self.starts[index]
        return self.token_ids[begin : self.offsets[index + 1]]

    def counts(self, vocab_size: int) -> Tensor:
        """(V,) how often the target wrote each token in the texts to train on."""
        owner = torch.repeat_interleave(torch.arange(len(self)), self.lengths)
        place = torch.arange(len(self.token_ids)) - self.offsets[owner]
        ours = (place >= self.starts[owner]) & ~self.held_out[owner]
        return torch.bincount(self.token_ids[ours].long(), minlength=vocab_size)


@dataclass(slots=True)
class RolloutFolder:
    """seconds: what writing has taken so far; prompts: how many have been answered; tokens: how many were written.
    All of them count what waits for its shard too."""

    path: Path
    shards: int = 0
    seconds: float = 0.0
    prompts: int = 0
    tokens: int = 0
    _waiting: list[Text] = field(default_factory=list)
    _waits_since: float = 0.0  # in `seconds`

    @classmethod
    def open(cls, path: Path) -> RolloutFolder:
        folder = cls(path)
        while folder._shard(folder.shards).exists():
            _, notes = read_tensors(folder._shard(folder.shards))
            folder.seconds, folder.prompts, folder.tokens = notes["seconds"], notes["prompts"], notes["tokens"]
            folder.shards += 1
        folder._waits_since = folder.seconds
        return folder

    def _shard(self, index: int) -> Path:
        return self.path / f"shard-{index:05d}.safetensors"

    def asked(self) -> Iterator[Prompt]:
        """The prompts of what is in shards."""
        for index in range(self.shards):
            shard, _ = read_tensors(self._shard(index))
            texts = torch.split(shard["token_ids"], shard["lengths"].tolist())
            for text, start in zip(texts, shard["starts"].tolist(), strict=True):
                yield text[:start].tolist()

    def add(self, texts: Sequence[Text], prompts: int, seconds: float) -> None:
        """prompts, seconds: what the texts took."""
        kept = [text for text in texts if len(text[1]) >= SHORTEST]
        self.prompts += prompts
        self.seconds += seconds
        self.tokens += sum(len(written) for _, written, _ in kept)
        self._waiting += kept
        waiting = sum(len(written) for _, written, _ in self._waiting)
        if waiting >= SHARD_TOKENS or self.seconds - self._waits_since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write a shard of what waits for one."""
        self._waits_since = self.seconds
        if not self._waiting:
            return
        kept, self._waiting = self._waiting, []
        whole = [prompt + written for prompt, written, _ in kept]
        tensors = {
            "token_ids": torch.tensor([token for text in whole for token in text], dtype=torch.int32),
            "lengths": torch.tensor([len(text) for text in whole], dtype=torch.int64),
            "starts": torch.tensor([len(prompt) for prompt, _, _ in kept], dtype=torch.int64),
            "held_out": torch.tensor([held_out for _, _, held_out in kept], dtype=torch.bool),
        }
        notes = {"seconds": self.seconds, "prompts": self.prompts, "tokens": self.tokens}
        write_tensors(self._shard(self.shards), tensors, notes)
        self.shards += 1

    def load(self) -> Rollouts:
        """What is in shards. FlashSpecError where there is nothing to train on, or nothing to measure with."""
        shards = [read_tensors(self._shard(index))[0] for index in range(self.shards)]
        if not shards:
            raise FlashSpecError("the target wrote no text in its share of the time: give more --minutes")
        joined = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
        held_out = joined["held_out"]
        if not held_out.any() or held_out.all():
            raise FlashSpecError(f"{len(held_out)} texts are too few to train and to measure: give more --minutes")
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), joined["lengths"].cumsum(0)])
        return Rollouts(joined["token_ids"], offsets, joined["starts"], held_out)


class Writer:
    """The target, writing batches until it is told to stop."""

    def __init__(self, target: Target, length: int, seed: int, over: Callable[[], bool]) -> None:
        quiet = MetricsConfig(track_acceptance=False, track_throughput=False, track_latency=False)
        config = FlashSpecConfig(device=str(target.loaded.model.device), metrics=quiet)
        silent = replace(target.loaded, tokenizer=None)  # nobody reads along: no text is made of the tokens
        self.engine = SpeculativeEngine(config, [], silent, arms=["plain"])
        self.length = min(length, target.decoder.max_context)
        self._over = over
        self._name, self._silent = target.loaded.name, 0
        self._seeds = count(seed * 1_000_003 % 2**62)

    def write(self, prompts: list[Prompt], most: int, temperature: float = 1.0, whole: bool = True) -> list[Prompt]:
        """What the target adds to each; cut short when time is over and, unless they should be whole, when most of the
        batch are at their end; empty where its logits are not finite. FlashSpecError where whole batches are, again and
        again."""
        sampling = SamplingConfig(temperature=temperature, seed=next(self._seeds))
        generation = self.engine.stream(prompts, most, sampling=sampling)
        few = 0 if whole else STRAGGLERS * len(prompts)
        for record in generation.records():
            if len(record.rows) <= few or self._over():
                break
        result = generation.result()
        self._silent = self._silent + 1 if all(reason == "error" for reason in result.finish_reasons) else 0
        if self._silent == SILENT:
            raise FlashSpecError(f"the logits of {self._name} are not finite: it writes no text to train on")
        rows = zip(result.output_ids.tolist(), result.finish_reasons, strict=True)
        return [[] if reason == "error" else [token for token in row if token >= 0] for row, reason in rows]


def write_rollouts(
    target: Target,
    folder: RolloutFolder,
    settings: Settings,
    prompts: Path | None,
    *,
    stopped: Callable[[], bool],
    progress: Progress,
    clock: Clock = time.monotonic,
) -> None:
    """Fill the folder until writing has taken its share of the time, or has its tokens, or `stopped` says so."""
    share = settings.seconds * settings.writing_share
    begun = clock() - folder.seconds

    def over() -> bool:
        return stopped() or clock() - begun >= share

    rows = settings.rows or batch_rows(target, settings.length)
    writer = Writer(target, settings.length, settings.seed + 7919 * folder.shards, over)
    half = writer.length // 2
    if prompts is None:
        seed = settings.seed + folder.prompts
        source = _own_tasks(own_prompts(target, writer.write, rows, half, seed, folder.asked()), folder.prompts)
    else:
        source = _file_tasks(file_prompts(prompts, target, half), rows, folder.prompts)
    waiting, skipped = {temperature: list[_Task]() for temperature in ANSWERS}, 0
    while not over() and folder.tokens < settings.most_tokens:
        for task in next(source):
            if task.temperature is None:
                skipped += 1
            else:
                waiting[task.temperature].append(task)
        for temperature, tasks in waiting.items():
            asked, later = tasks[:rows], tasks[rows:]
            if over() or not asked or (len(asked) < rows and folder.tokens):  # full batches, once there is any text
                continue
            answers = writer.write([task.prompt for task in asked], half, temperature, whole=False)
            texts = [(task.prompt, answer, task.held_out) for task, answer in zip(asked, answers, strict=True)]
            folder.add(texts, len(asked) + skipped, clock() - begun - folder.seconds)
            waiting[temperature], skipped = later, 0
        done = max((clock() - begun) / share, folder.tokens / settings.most_tokens)
        progress(f"the target writes: {folder.tokens:,} tokens", min(done, 1.0))
    folder.flush()


@dataclass(frozen=True, slots=True)
class _Task:
    """A prompt to answer; temperature None: it has been answered before, in the only way that there is."""

    prompt: Prompt
    held_out: bool
    temperature: float | None


def _own_tasks(source: Iterator[list[Prompt]], first: int) -> Iterator[list[_Task]]:
    for batch in source:
        yield [
            _Task(prompt, _is_held_out(i), ANSWERS[not (_is_held_out(i) or i % 2)])
            for i, prompt in enumerate(batch, first)
        ]
        first += len(batch)


def _file_tasks(prompts: Sequence[Prompt], rows: int, first: int) -> Iterator[list[_Task]]:
    """Over the file again and again: every prompt has one greedy answer, held-out ones have no other."""
    for start in count(first, rows):
        tasks = []
        for index in range(start, start + rows):
            turn, place = divmod(index, len(prompts))
            held_out = _is_held_out(place)
            greedy = turn == 0 if held_out else turn < 2 and (place + turn) % 2 == 1
            temperature = ANSWERS[0] if greedy else None if held_out else ANSWERS[1]
            tasks.append(_Task(prompts[place], held_out, temperature))
        yield tasks


def _is_held_out(index: int) -> bool:
    return index % HELD_OUT == 0 and index < HELD_OUT * MOST_HELD_OUT


def batch_rows(target: Target, length: int) -> int:
    """How many texts to write at once: on a GPU what a quarter of the free memory holds, at most 1,024."""
    config, device = target.decoder.config, target.decoder.device
    if device.type == "cpu":
        return 8
    slot = (
        2 * config.num_layers * config.num_kv_heads * config.head_dim * target.decoder.weights.embedding.element_size()
    )
    free, _ = torch.cuda.mem_get_info(device)
    rows = max(1, min(1024, int(free / 4 / (slot * length))))
    return 1 << (rows.bit_length() - 1)
