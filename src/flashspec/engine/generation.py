"""One call of the engine, as an iterator of what it writes."""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from flashspec.config import SamplingConfig
from flashspec.core import FinishReason, GenerationResult, StepRecord, full_gpu_said
from flashspec.engine.loop import Run, StepOutput
from flashspec.engine.output import Chunk, RowText, make_result
from flashspec.engine.prefix import PrefixCache
from flashspec.engine.state import DecodeState
from flashspec.models.tokenizer import TextStream
from flashspec.sampling.sampler import make_sampler

if TYPE_CHECKING:
    from flashspec.engine.engine import SpeculativeEngine


class Generation:
    """Iterating it decodes and yields Chunks. Leaving the loop ends it, and so does `result()`, with what is written so
    far; rows that were not at their end are 'cancelled'. The engine is held from the first chunk to the end."""

    def __init__(
        self,
        engine: SpeculativeEngine,
        prompts: list[list[int]],
        max_new_tokens: int,
        settings: SamplingConfig,
        memory: PrefixCache | None,
    ) -> None:
        self.engine = engine
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.settings = settings
        self.memory = memory
        self.seed = secrets.randbelow(2**63) if settings.seed is None else settings.seed
        tokenizer = engine.tokenizer
        self.rows = [RowText(settings.stop, TextStream(tokenizer) if tokenizer else None) for _ in prompts]
        self.steps: list[StepRecord] = []
        self.seconds = 0.0
        self._outputs = self._decode()
        self._chunks = self._write()

    def __iter__(self) -> Iterator[Chunk]:
        yield from self._chunks  # not the generator itself: that one and self keep each other alive when a loop is left

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def records(self) -> Iterator[StepRecord]:
        """The same, a step an item, for callers of `result` only: half of a large batch's host time is its Chunks."""
        with closing(self._outputs) as outputs:
            for output in outputs:
                for row in output.rows:
                    self.rows[row].add(output.news, row)
                yield output.record

    def result(self) -> GenerationResult:
        self._chunks.close()
        self._outputs.close()
        for row in self.rows:
            if row.finish is FinishReason.RUNNING:
                row.finish = FinishReason.CANCELLED
                row.close()
        return make_result(
            self.rows,
            self.steps,
            self.seconds,
            self.seed,
            self.prompts,
            self.engine.tokenizer is not None,
            self.settings.logprobs is not None,
        )

    def _write(self) -> Generator[Chunk, None, None]:
        with closing(self._outputs) as outputs:
            for output in outputs:
                news = output.news
                for row in output.rows:
                    count, text = self.rows[row].add(news, row)
                    token_ids, logprobs, finish = news.token_ids[row], news.logprobs[row], self.rows[row].finish
                    reason = None if finish is FinishReason.RUNNING else finish.name.lower()
                    yield Chunk(row, token_ids[:count], text, output.record, logprobs[:count], reason)

    def _decode(self) -> Generator[StepOutput, None, None]:
        with self.engine.turn, full_gpu_said():
            started = time.perf_counter()
            run = self.begin()
            try:
                with suppress(GeneratorExit):  # left between two steps: what was read until then is sound
                    yield from self._follow(run, started)
                self._end(run)
            except BaseException:
                if run.workspace is not None:
                    run.workspace.wipe()
                raise
            finally:
                run.close()

    def _follow(self, run: Run, started: float) -> Iterator[StepOutput]:
        for output in run:
            self.steps.append(output.record)
            self.engine.metrics.record(output.record)
            self.seconds = time.perf_counter() - started
            yield output
            for row in output.rows if self.settings.stop else ():
                if self.rows[row].cut and output.news.finish[row] is FinishReason.RUNNING:
                    run.cancel(row, FinishReason.STOP)

    def begin(self) -> Run:
        """The run of this call; on a GPU everything that it needs is compiled and captured afterwards."""
        engine, settings, model = self.engine, self.settings, self.engine.target
        eos_ids = () if settings.ignore_eos else engine.eos_token_ids
        stop_ids = sorted({*eos_ids, *settings.stop_token_ids})
        limits = [min(len(prompt) + self.max_new_tokens, model.max_context) for prompt in self.prompts]
        workspaces = engine.workspaces
        workspace = workspaces.find(len(self.prompts), max(limits), len(stop_ids)) if workspaces else None
        rows = len(self.prompts) if workspace is None else len(workspace.state.tokens)
        prompts = [*self.prompts, *[[0]] * (rows - len(self.prompts))]
        sampler = make_sampler(settings, prompts, stop_ids, model.vocab_size, self.seed, model.device)
        costs = engine.costs.for_rows(len(self.prompts)) if workspace is None else workspace.costs
        batch = (settings.logprobs, costs.token_cost, self.memory)
        if workspaces is None or workspace is None:
            state = DecodeState.create(prompts, limits, stop_ids, model, sampler, *batch)
        else:
            admit = partial(workspace.admit, self.prompts, limits, stop_ids, sampler, *batch)
            state = workspaces.with_room(admit, keep=workspace)
        lag = int(model.device.type == "cuda")
        selector = engine.selector_for(len(self.prompts), costs)
        return Run(state, engine.arms, selector, engine.drafters, lag, workspace=workspace)

    def _end(self, run: Run) -> None:
        texts = run.state.texts[: len(self.prompts)]
        failed = any(row.finish is FinishReason.ERROR for row in self.rows)
        if run.workspace is not None:
            if run.broken or failed:
                run.workspace.wipe()
        elif self.memory is not None and not failed:  # a drafter that failed may have left its cache half written
            self.memory.keep(texts[0], run.state.readers[:1] if run.broken else run.state.readers)
        for drafter in self.engine.drafters.values():
            drafter.learn(texts)


class Conversation:
    """Messages so far and what the models have read of them."""

    def __init__(self, engine: SpeculativeEngine, system: str | None = None) -> None:
        self.engine = engine
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self.memory = PrefixCache()
        self._reading = False

    def send(self, message: str, max_new_tokens: int | None = None, **changes: Any) -> Iterator[Chunk]:
        """Ask, and stream the answer. The question joins the messages at once, if it can be answered: ValueError as for
        `generate`. The answer is written while it is read, and joins them when it ends, or is left early; the next
        question takes the place of one whose answer nobody began to read. RuntimeError while one is being read."""
        if self._reading:
            raise RuntimeError("the answer before is still being read: read it to its end, or close it")
        if self.messages and self.messages[-1]["role"] == "user":  # nobody read its answer
            self.messages = self.messages[:-1]
        messages = [*self.messages, {"role": "user", "content": message}]
        self.last = self.engine.stream(messages, max_new_tokens, memory=self.memory, **changes)
        self.messages = messages
        return self._answer(self.last)

    def _answer(self, generation: Generation) -> Iterator[Chunk]:
        self._reading = True
        try:
            yield from generation
        finally:
            self._reading = False
            self.messages.append({"role": "assistant", "content": generation.result().text})
