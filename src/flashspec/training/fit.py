"""The loop: AdamW against the clock, with everything in a file that a kill leaves whole."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashspec.core import FlashSpecError
from flashspec.kernels import decoding
from flashspec.training.batches import Batch, Lesson, endless, held_out_order, make_batch
from flashspec.training.features import Reading, hidden_states
from flashspec.training.files import read_tensors, write_tensors
from flashspec.training.heads import DraftHead
from flashspec.training.measure import CHUNK, Measure, Teacher, accepted_lengths, draft_loss, summarise, walk
from flashspec.training.rollouts import Clock, Rollouts
from flashspec.training.settings import Kind, Progress, Settings
from flashspec.training.target import Target

CLIP = 1.0  # of the gradient's norm
HELD_OUT_TOKENS = {"cuda": 32768, "cpu": 4096}
SCORE_BYTES = 16  # what a score of one position keeps until the gradients are there
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Without cuDNN's, which plans anew for every shape: 4.4 times the time a step, measured on an H200.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(slots=True)
class Position:
    """Where a training stands. seconds: spent in it, over all its runs."""

    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    epoch: int = 0
    place: int = 0
    measures: list[Measure] = field(default_factory=list)


class Fit:
    """One drafter on its way. seconds: of training alone."""

    def __init__(
        self,
        head: DraftHead,
        target: Target,
        teacher: Teacher,
        rollouts: Rollouts,
        settings: Settings,
        feature_layers: list[int],
        seconds: float,
        clock: Clock = time.monotonic,
    ) -> None:
        self.head, self.target, self.teacher, self.rollouts, self.settings = head, target, teacher, rollouts, settings
        self.feature_layers, self.seconds, self.clock = feature_layers, seconds, clock
        self.position = Position()
        self.steps = 1 if settings.kind is Kind.TINY else settings.unroll
        self.device = target.decoder.device
        self.known = teacher.vocabulary.t2d.cpu()
        self.multiple = 1  # of how many positions a draft step is taught at a time
        if decoding.available(self.device):
            head.compile_parts()
            self.multiple = CHUNK  # so that the loss is compiled once
        self.optimiser = torch.optim.AdamW(
            head.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.batch_tokens = settings.batch_tokens or batch_tokens(self.device, len(teacher.vocabulary) * self.steps)
        self.held_out = held_out_order(rollouts, self.batch_tokens, HELD_OUT_TOKENS[self.device.type])

    def run(
        self,
        save: Callable[[], None],
        *,
        stopped: Callable[[], bool],
        progress: Progress,
        measured: Callable[[Measure], None],
    ) -> None:
        """Train until the time is over or `stopped` says so; `save` after each look at the held-out text."""
        with sdpa_kernel(_ATTENTION):
            self._run(save, stopped, progress, measured)

    def _run(
        self,
        save: Callable[[], None],
        stopped: Callable[[], bool],
        progress: Progress,
        measured: Callable[[Measure], None],
    ) -> None:
        at, settings = self.position, self.settings
        if not at.measures:
            self._look(measured)
            save()
        last, looked, loss, said = self.clock(), at.seconds, None, ""
        for epoch, place, indices in endless(self.rollouts, self.batch_tokens, settings.seed, at.epoch, at.place):
            if stopped() or at.seconds >= self.seconds:
                break
            before, loss = loss, self._step(indices)
            if before is not None:  # read while the device takes this step
                said = f"loss {self._finite(before):.3f}, "
            at.steps, at.epoch, at.place = at.steps + 1, epoch, place
            now = self.clock()
            at.seconds, last = at.seconds + now - last, now
            length = at.measures[-1].length
            progress(f"training: {said}{length:.2f} tokens a step", at.seconds / self.seconds)
            if at.seconds - looked >= settings.measure_every and at.seconds < self.seconds:
                looked = at.seconds
                self._finite(loss)
                self._look(measured)
                save()
        if loss is not None:
            self._finite(loss)
        if at.seconds >= self.seconds and at.measures[-1].tokens < at.tokens:
            self._look(measured)
        self._check(all(bool(weight.isfinite().all()) for weight in self.head.parameters()), "a weight is not finite")
        save()

    def learning_rate(self) -> float:
        """Warm-up, then a cosine, over the time and not over steps: how many there will be nobody knows."""
        done = min(self.position.seconds / self.seconds, 1.0)
        warm = min(1.0, (done + 1e-3) / self.settings.warm_up)
        return self.settings.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

    def _finite(self, loss: Tensor) -> float:
        value = float(loss)
        self._check(math.isfinite(value), f"the loss is {value}")
        return value

    def _check(self, sound: bool, what: str) -> None:
        if not sound:
            raise FlashSpecError(
                f"{what} after {self.position.steps} steps: take a smaller learning rate than "
                f"{self.settings.learning_rate:g}; the last checkpoint is intact"
            )

    def _step(self, indices: list[int]) -> Tensor:
        """The loss, which nobody has waited for."""
        batch, _, loss = self._read(indices)
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward([loss])
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), CLIP)
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate()
        self.optimiser.step()
        self.position.tokens += int((batch.lengths - batch.starts).sum())
        return loss.detach()

    def _read(self, indices: list[int]) -> tuple[Batch, Reading, Tensor]:
        """A batch on the host, what the target makes of it, and the head's loss."""
        batch = make_batch(self.rollouts, indices)
        lesson = Lesson.of(batch, self.known, self.steps, self.multiple).to(self.device)
        reading = hidden_states(self.target.decoder, batch.to(self.device).token_ids, self.feature_layers)
        with self._precision():
            return batch, reading, draft_loss(self.head, reading, lesson, self.teacher, self.settings.decay)

    def _look(self, measured: Callable[[Measure], None]) -> None:
        """With gradients, which nobody asks for: without them everything would be compiled once more."""
        losses, taken = [], []
        gamma = self.settings.gamma
        for indices in self.held_out:
            batch, reading, loss = self._read(indices)
            with self._precision():
                accepted = accepted_lengths(self.head, reading, batch.to(self.device), self.teacher.vocabulary, gamma)
            losses += [float(loss.detach())] * len(indices)
            rows = zip(accepted.tolist(), batch.starts.tolist(), batch.lengths.tolist(), strict=True)
            taken += [count for row, start, length in rows for count in walk(row, start, length, gamma)]
        rates, length = summarise(taken, gamma)
        at, mean = self.position, sum(losses) / len(losses)
        self._check(math.isfinite(mean), f"the loss on held-out text is {mean}")
        at.measures.append(Measure(at.seconds, at.tokens, mean, rates, length))
        measured(at.measures[-1])

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def write_state(self, path: Path) -> None:
        """Weights, moments and position in one file."""
        at = self.position
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.head.state_dict().items():
            tensors[f"weight.{name}"] = tensor
        for name, parameter in self.head.named_parameters():
            moments = self.optimiser.state.get(parameter)
            tensors |= {f"{moment}.{name}": moments[moment] for moment in _MOMENTS if moments}
        notes = {
            "seconds": at.seconds, "steps": at.steps, "tokens": at.tokens, "epoch": at.epoch, "place": at.place,
            "measures": [measure.to_json() for measure in at.measures], "batch_tokens": self.batch_tokens,
        }  # fmt: skip
        write_tensors(path, tensors, {"position": notes})

    def read_state(self, path: Path) -> None:
        """FlashSpecError where the file is of another drafter."""
        tensors, notes = read_tensors(path)
        position = notes["position"]
        measures = [Measure.from_json(measure) for measure in position.pop("measures")]
        self.batch_tokens = position.pop("batch_tokens")  # the place counts batches of this size
        self.position = Position(**position, measures=measures)
        weights = {name: tensors.get(f"weight.{name}") for name in self.head.state_dict()}
        for name, tensor in self.head.state_dict().items():
            stored = weights[name]
            if stored is None or stored.shape != tensor.shape:
                shape = tuple(tensor.shape)
                raise FlashSpecError(f"{path} holds no {name} of shape {shape}: train into another --out")
        self.head.load_state_dict(weights)
        for name, parameter in self.head.named_parameters():
            if f"exp_avg.{name}" in tensors:
                moments = {moment: tensors[f"{moment}.{name}"].to(self.device) for moment in _MOMENTS}
                self.optimiser.state[parameter] = {"step": torch.tensor(float(position["steps"])), **moments}


def batch_tokens(device: torch.device, scores: int) -> int:
    """Positions a batch, of so many scores each: on a GPU what a quarter of the free memory holds, at most 16,384."""
    if device.type == "cpu":
        return 2048
    gc.collect()  # what writing the texts took
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return int(max(1024, min(16384, free / 4 / (SCORE_BYTES * scores))))
