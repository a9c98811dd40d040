"""From a target's name to a drafter in a folder; whatever ends it early, the next call goes on from there."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashspec.core import FlashSpecError
from flashspec.models.checkpoint import read_json
from flashspec.models.embedded import silent
from flashspec.training.batches import make_batch
from flashspec.training.card import (
    CONFIG,
    WEIGHTS,
    build_head,
    head_config,
    model_card,
    parameters_of,
    write_checkpoint,
)
from flashspec.training.features import default_feature_layers, feature_scales, hidden_states
from flashspec.training.files import SCRATCH, alone, clear_scratch, read_tensors, write_json, write_whole
from flashspec.training.fit import Fit
from flashspec.training.measure import Measure, Teacher
from flashspec.training.rollouts import Clock, RolloutFolder, Rollouts, write_rollouts
from flashspec.training.settings import Kind, Progress, Settings
from flashspec.training.target import Target, load_target
from flashspec.training.vocabulary import choose_vocabulary, coverage_of

_FIXED = (
    "kind",
    "seed",
    "length",
    "draft_vocab",
    "coverage",
    "intermediate_size",
    "layers",
    "shares_lm_head",
    "unroll",
)
SAMPLE = 8  # texts that say how large the target's features are
LONGER = 1.5  # times what there was when texts were written, from where on they are few


@dataclass(frozen=True, slots=True)
class Outcome:
    """folder: where the drafter is, if there are measures. bytes: of its weights. interrupted: `resume` goes on."""

    folder: Path
    kind: Kind
    parameters: int
    bytes: int
    measures: tuple[Measure, ...]
    interrupted: bool


@dataclass(frozen=True, slots=True)
class _Work:
    """What a training keeps beside the drafter."""

    out: Path

    @property
    def run(self) -> Path:
        return self.out / "training" / "run.json"

    @property
    def rollouts(self) -> Path:
        return self.out / "training" / "rollouts"

    @property
    def written(self) -> Path:
        """There once the target has written all that it will."""
        return self.rollouts / "complete.json"

    @property
    def state(self) -> Path:
        return self.out / "training" / "state.safetensors"

    @property
    def begun(self) -> bool:
        """Whether there is anything to go on with, or to lose."""
        return any((self.state.exists(), (self.out / WEIGHTS).exists(), any(self.rollouts.glob("shard-*"))))


def never() -> bool:
    return False


def ignore(measure: Measure) -> None:
    """A look that nobody hears of."""


def train_drafter(
    source: str | Path,
    out: Path,
    settings: Settings,
    *,
    prompts: Path | None = None,
    texts: Path | None = None,
    device: str | None = None,
    resume: bool = False,
    stopped: Callable[[], bool] = never,
    progress: Progress = silent,
    measured: Callable[[Measure], None] = ignore,
    clock: Clock = time.monotonic,
) -> Outcome:
    """Train a drafter for the target `source` into the folder `out`. prompts None: the target thinks of its own.
    texts: the `out` of an earlier training of the same target, whose texts are taken in place of new ones.

    resume: go on where an earlier call with the same settings, prompts and texts ended, or with more time.
    FlashSpecError or ValueError says in a sentence what cannot be done."""
    begun, work = clock(), _Work(out)
    if prompts is not None and texts is not None:
        raise ValueError("texts of an earlier training take no prompts: give one of the two")
    _check_place(work, resume)
    with alone(work.run.parent):
        clear_scratch(out)
        target = load_target(source, device, progress)
        source_of_texts = _source_of_texts(prompts, texts)
        if work.begun:
            _check_agreement(work, target, settings, source_of_texts)
            if texts is None:
                _warn_of_few_texts(work, settings)
        facts = {"target": target.loaded.name, "target_hash": target.hash(), "texts": source_of_texts}
        write_json(work.run, {**facts, "seconds": settings.seconds, **_fixed(settings)})
        if texts is not None and not work.written.exists():
            _adopt(work, _Work(texts), target)
        folder = RolloutFolder.open(work.rollouts)
        if not work.written.exists():
            earlier = folder.seconds
            write_rollouts(target, folder, settings, prompts, stopped=stopped, progress=progress, clock=clock)
            if stopped():
                return Outcome(out, settings.kind, 0, 0, (), True)
            folder.load()  # too little is said before anything is called complete
            origin = f"prompts of {prompts.name}" if prompts else "prompts that the target thought of"
            spent = earlier + clock() - begun
            write_json(work.written, {"seconds": spent, "origin": origin, "given": settings.seconds})
        fit, save = _prepare(target, settings, work, folder.load(), clock)
        fit.run(save, stopped=stopped, progress=progress, measured=measured)
        size = (out / WEIGHTS).stat().st_size
        interrupted = fit.position.seconds < fit.seconds
        return Outcome(out, settings.kind, parameters_of(fit.head), size, tuple(fit.position.measures), interrupted)


def earlier_seconds(out: Path) -> float | None:
    """What a training in a folder was given the last time; None where there is none."""
    run = _Work(out).run
    return read_json(run).get("seconds") if run.is_file() else None


def _prepare(
    target: Target, settings: Settings, work: _Work, rollouts: Rollouts, clock: Clock
) -> tuple[Fit, Callable[[], None]]:
    """The training as it was left, or from its beginning, and what saves it."""
    counts = rollouts.counts(target.decoder.vocab_size)
    counts[target.writable_ids :] = 0
    ends = [index for index in target.loaded.eos_token_ids if index < len(counts)]
    vocabulary = choose_vocabulary(counts, settings.coverage, settings.draft_vocab, ends)
    covered = coverage_of(vocabulary, counts)
    features = default_feature_layers(target.decoder.num_layers)
    config = head_config(target, settings, len(vocabulary), features)
    vocabulary = vocabulary.to(target.decoder.device)
    sample = make_batch(rollouts, range(min(len(rollouts), SAMPLE))).to(target.decoder.device)
    scales = feature_scales(hidden_states(target.decoder, sample.token_ids, features), sample.lengths)
    head = build_head(config, target, vocabulary, scales, settings.seed)
    teacher = Teacher(vocabulary, target.decoder.weights.lm_head[vocabulary.ids])
    written = read_json(work.written)
    seconds = max(settings.seconds - written["seconds"], 1.0)
    fit = Fit(head, target, teacher, rollouts, settings, features, seconds, clock)
    if work.state.exists():
        fit.read_state(work.state)
    data = (
        f"{int(counts.sum()):,} tokens in {len(rollouts):,} texts, {written['origin']}; "
        f"{covered:.1%} of the tokens can be drafted"
    )

    def save() -> None:
        card = model_card(target, settings, config, data, fit.position.measures, parameters_of(head))
        fit.write_state(work.state)
        write_checkpoint(work.out, head, vocabulary, config, card)

    return fit, save


def _adopt(work: _Work, other: _Work, target: Target) -> None:
    """Copy another training's texts; they took none of this one's time."""
    if not other.written.exists():
        raise FlashSpecError(f"{other.out} holds no finished texts: it should be the --out of an earlier training")
    if read_json(other.run)["target_hash"] != target.hash():
        raise FlashSpecError(f"the texts in {other.out} are another target's than {target.loaded.name}'s")
    for path in sorted(other.rollouts.glob("*.safetensors")):
        write_whole(work.rollouts / path.name, path.read_bytes())
    write_json(work.written, {**read_json(other.written), "seconds": 0.0})


def _source_of_texts(prompts: Path | None, texts: Path | None) -> str:
    """Where the texts come from, in words that are others for another file or folder."""
    if texts is not None:
        return f"the texts in {texts.resolve().name}"
    if prompts is None:
        return "prompts that the target thinks of"
    return f"the prompts in {prompts.name} (SHA-256 {hashlib.sha256(prompts.read_bytes()).hexdigest()[:8]})"


def _fixed(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in _FIXED}


def _check_place(work: _Work, resume: bool) -> None:
    """Before anything is loaded: nothing of somebody else's is ever written over."""
    out = work.out
    if out.exists() and not out.is_dir():
        raise FlashSpecError(f"--out {out} is a file; it should be a folder, or nothing yet")
    if work.run.exists() and work.begun:
        if not resume:
            raise FlashSpecError(f"{out} holds a training already: go on with --resume, or choose another --out")
    elif any(path.is_file() and path != work.run and not path.name.endswith(SCRATCH) for path in out.rglob("*")):
        what = "a model of another origin" if (out / CONFIG).exists() else "other files"
        raise FlashSpecError(f"{out} holds {what}: choose another --out")


def _check_agreement(work: _Work, target: Target, settings: Settings, source_of_texts: str) -> None:
    earlier = read_json(work.run)
    if missing := {"target", "target_hash", "texts", "seconds", *_FIXED} - earlier.keys():
        raise FlashSpecError(f"{work.run} does not say its {min(missing)}: choose another --out")
    if earlier["target_hash"] != target.hash():
        raise FlashSpecError(
            f"{work.out} holds a drafter for {earlier['target']} with other weights than {target.loaded.name}'s: "
            "choose another --out"
        )
    for name, value in _fixed(settings).items():
        if earlier[name] != value:
            raise ValueError(f"{name} is {value}, but {work.out} was begun with {earlier[name]}")
    if earlier["texts"] != source_of_texts:
        raise ValueError(f"this asks for {source_of_texts}, but {work.out} was begun with {earlier['texts']}")
    if settings.seconds < min(earlier["seconds"], spent := _spent(work)):
        raise ValueError(
            f"{settings.seconds / 60:g} minutes in all are less than the {spent / 60:.3g} that went into {work.out}"
        )


def _spent(work: _Work) -> float:
    """Seconds of writing and of training."""
    writing = read_json(work.written)["seconds"] if work.written.exists() else RolloutFolder.open(work.rollouts).seconds
    training = read_tensors(work.state)[1]["position"]["seconds"] if work.state.exists() else 0.0
    return float(writing + training)


def _warn_of_few_texts(work: _Work, settings: Settings) -> None:
    if not work.written.exists():
        return
    now, before = settings.seconds / 60, read_json(work.written).get("given", settings.seconds) / 60
    if now > LONGER * before:
        warnings.warn(
            f"no text is written any more: all {now:g} minutes train on what {before:g} minutes had time for; "
            "a new --out gets more",
            RuntimeWarning,
            stacklevel=3,
        )
