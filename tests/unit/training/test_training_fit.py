"""From a target to a drafter that the engine takes: it learns, it resumes, it is never half there."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from held_out import tokens_a_step
from small_models import llama

import flashspec.training.fit
from flashspec.core import FlashSpecError
from flashspec.drafters.heads import likeness
from flashspec.models.checkpoint import SafetensorsFolder, read_json
from flashspec.training import Kind, Outcome, Settings, earlier_seconds, train_drafter
from flashspec.training.card import build_head, head_config
from flashspec.training.command import _source_of_texts
from flashspec.training.files import alone, read_tensors
from flashspec.training.measure import Measure
from flashspec.training.rollouts import RolloutFolder
from flashspec.training.target import Target, load_target
from flashspec.training.vocabulary import DraftVocabulary

SETTINGS = Settings(
    seconds=60.0,
    writing_share=0.4,
    most_tokens=2000,
    rows=8,
    length=32,
    batch_tokens=256,
    learning_rate=5e-3,
    measure_every=25.0,
    unroll=4,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target whose text is easy to guess: its logits are sharp."""
    path = tmp_path_factory.mktemp("target")
    model = llama(num_hidden_layers=3, vocab_size=100)
    model.lm_head.weight.mul_(6.0)
    model.save_pretrained(path)
    return path


def revision_of(path: Path) -> Path:
    """The same target with a little of one layer's query projection changed, as a merged LoRA leaves it."""
    model = llama(num_hidden_layers=3, vocab_size=100)
    model.lm_head.weight.mul_(6.0)
    model.model.layers[1].self_attn.q_proj.weight.mul_(1.01)
    model.save_pretrained(path)
    return path


class Steps:
    """A clock that stands still until training begins, and then goes on by one at every step."""

    def __init__(self, going: bool) -> None:
        self.going, self._now = going, 0

    def __call__(self) -> float:
        self._now += self.going
        return float(self._now)


class StopAfter:
    """Ctrl-C while the so manieth training step is under way."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        return self.left <= 0

    def progress(self, what: str, fraction: float | None) -> None:
        self.left -= what.startswith("training")


def train(source: Path, out: Path, settings: Settings = SETTINGS, **options: Any) -> Outcome:
    """`seconds` are steps."""
    clock = Steps(going=(out / "training" / "state.safetensors").exists())

    def begin(measure: Measure) -> None:
        clock.going = True

    options = {"measured": begin, "clock": clock, **options}
    return train_drafter(source, out, settings, device="cpu", **options)


@pytest.mark.parametrize("kind", list(Kind))
def test_acceptance_rises_and_the_engine_finds_what_was_measured(source: Path, tmp_path: Path, kind: Kind) -> None:
    outcome = train(source, tmp_path / "head", replace(SETTINGS, kind=kind, seconds=120.0, most_tokens=6000))
    assert not outcome.interrupted
    first, last = outcome.measures[0], outcome.measures[-1]
    gain = 0.1 if kind is Kind.MEDUSA else 0.5  # that begins as the target's own guess, which is good here
    assert last.loss < first.loss - gain
    assert last.length > first.length + gain
    assert tokens_a_step(source, tmp_path / "head") == pytest.approx(last.length, abs=0.1)


@pytest.mark.parametrize("shares", [False, True], ids=["published", "ours"])
def test_medusa_heads_learn_all_of_what_a_token_decides(tmp_path: Path, shares: bool) -> None:
    """A target whose layers add nothing writes a fixed successor of each token."""
    model = llama(num_hidden_layers=3, vocab_size=100)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.lm_head.weight.mul_(20.0)
    model.save_pretrained(tmp_path / "target")
    settings = replace(SETTINGS, kind=Kind.MEDUSA, shares_lm_head=shares, seconds=120.0, most_tokens=6000)
    last = train(tmp_path / "target", tmp_path / "head", settings).measures[-1]
    assert last.length > 4.6
    assert tokens_a_step(tmp_path / "target", tmp_path / "head") == pytest.approx(last.length, abs=0.1)


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(source: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, seconds=20.0)
    train(source, tmp_path / "whole", settings)
    stop = StopAfter(7)
    outcome = train(source, tmp_path / "torn", settings, stopped=stop, progress=stop.progress)
    assert outcome.interrupted
    with pytest.raises(FlashSpecError, match=r"go on with --resume"):
        train(source, tmp_path / "torn", settings)
    assert not train(source, tmp_path / "torn", settings, resume=True).interrupted
    whole, torn = (read_tensors(tmp_path / name / "training" / "state.safetensors") for name in ("whole", "torn"))
    assert whole[0].keys() == torn[0].keys()
    for name, tensor in whole[0].items():
        assert tensor.equal(torn[0][name]), name
    for field in ("steps", "seconds", "tokens", "epoch", "place"):
        assert whole[1]["position"][field] == torn[1]["position"][field]


def test_more_time_goes_on_training(source: Path, tmp_path: Path) -> None:
    short = train(source, tmp_path / "head", replace(SETTINGS, seconds=10.0))
    assert earlier_seconds(tmp_path / "head") == 10.0
    with pytest.warns(RuntimeWarning, match=r"train on what 0.166667 minutes had time for; a new --out gets more"):
        longer = train(source, tmp_path / "head", replace(SETTINGS, seconds=40.0), resume=True)
    assert earlier_seconds(tmp_path / "head") == 40.0
    assert longer.measures[: len(short.measures)] == short.measures
    assert longer.measures[-1].tokens > short.measures[-1].tokens
    assert longer.measures[-1].loss < short.measures[-1].loss


@pytest.mark.parametrize("every", [1.0, 25.0], ids=["at a look", "at the end"])
def test_a_training_that_diverges_leaves_the_last_sound_checkpoint(source: Path, tmp_path: Path, every: float) -> None:
    out = tmp_path / "head"
    train(source, out, replace(SETTINGS, seconds=1.0))
    before = {path: path.read_bytes() for path in (out / "model.safetensors", out / "training" / "state.safetensors")}
    settings = replace(SETTINGS, seconds=4.0, learning_rate=1e30, measure_every=every)
    with pytest.raises(FlashSpecError, match="the last checkpoint is intact"):
        train(source, out, settings, resume=True)
    assert {path: path.read_bytes() for path in before} == before


def test_the_texts_of_an_earlier_training(source: Path, tmp_path: Path) -> None:
    train(source, tmp_path / "first", replace(SETTINGS, seconds=3.0))
    train(source, tmp_path / "second", replace(SETTINGS, seconds=3.0, kind=Kind.MEDUSA), texts=tmp_path / "first")
    first, second = (RolloutFolder.open(tmp_path / name / "training" / "rollouts") for name in ("first", "second"))
    assert second.load().token_ids.equal(first.load().token_ids)
    with pytest.raises(FlashSpecError, match=r"holds no finished texts"):
        train(source, tmp_path / "third", texts=tmp_path)
    other = tmp_path / "other"
    llama(num_hidden_layers=3, vocab_size=101).save_pretrained(other)
    for another in (other, revision_of(tmp_path / "revision")):
        with pytest.raises(FlashSpecError, match=r"are another target's than"):
            train(another, tmp_path / f"for {another.name}", texts=tmp_path / "first")


def test_stopped_while_the_target_writes(source: Path, tmp_path: Path) -> None:
    stop = StopAfter(1)

    def progress(what: str, fraction: float | None) -> None:
        stop.left -= what.startswith("the target writes")

    assert train(source, tmp_path / "head", stopped=stop, progress=progress) == Outcome(
        tmp_path / "head", Kind.EAGLE3, 0, 0, (), True
    )
    assert not train(source, tmp_path / "head", replace(SETTINGS, seconds=5.0), resume=True).interrupted
    with pytest.raises(ValueError, match=r"0.05 minutes in all are less than the 0.0833 that went into .*head"):
        train(source, tmp_path / "head", replace(SETTINGS, seconds=3.0), resume=True)
    assert not train(source, tmp_path / "head", replace(SETTINGS, seconds=5.0), resume=True).interrupted


def test_a_kill_while_saving_leaves_the_old_checkpoint(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "head"
    train(source, out, replace(SETTINGS, seconds=5.0))
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}

    def killed(self: object, path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(flashspec.training.fit.Fit, "write_state", killed)
        train(source, out, replace(SETTINGS, seconds=10.0), resume=True)
    assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert not train(source, out, replace(SETTINGS, seconds=10.0), resume=True).interrupted


def test_a_training_is_saved_after_its_first_look(source: Path, tmp_path: Path) -> None:
    seen = []

    def progress(what: str, fraction: float | None) -> None:
        if what.startswith("training"):
            seen.append(
                [(tmp_path / "head" / name).exists() for name in ("model.safetensors", "training/state.safetensors")]
            )

    train(source, tmp_path / "head", replace(SETTINGS, seconds=3.0), progress=progress)
    assert seen[0] == [True, True]


@pytest.mark.parametrize(
    ("kind", "shares"), [(Kind.EAGLE3, True), (Kind.MEDUSA, True), (Kind.EAGLE3, False), (Kind.MEDUSA, False)]
)
def test_what_is_in_the_folder(source: Path, tmp_path: Path, kind: Kind, shares: bool) -> None:
    settings = replace(
        SETTINGS, kind=kind, seconds=5.0, draft_vocab=64, shares_lm_head=shares, unroll=3, intermediate_size=32
    )
    outcome = train(source, tmp_path / "head", settings)
    tensors, _ = read_tensors(tmp_path / "head" / "model.safetensors")
    own = {
        name for name in tensors if tensors[name].shape == (64, 64) and name.endswith(("lm_head.weight", ".1.weight"))
    }
    assert bool(own) is not shares
    assert ("fc.weight" in tensors) is (kind is Kind.EAGLE3 or shares)
    assert tensors["t2d"].shape == (100,)
    assert tensors["t2d"].sum() == 64
    assert (tensors["d2t"] + torch.arange(64)).equal(tensors["t2d"].nonzero()[:, 0])
    assert tensors["d2t"].dtype == torch.int64
    config = read_json(tmp_path / "head" / "config.json")
    assert config["draft_vocab_size"] == 64
    assert config["flashspec"] == {
        "kind": kind,
        "target": str(source),
        "revision": "",
        "target_hash": load_target(source, "cpu").hash(),
        "target_hash_float16": load_target(source, "cpu").float16_hash(),
        "target_likeness": likeness(load_target(source, "cpu").decoder.sample()),
        "feature_layers": [-1, 0, 1],  # of three layers
        "shares_lm_head": shares,
    }
    assert outcome.bytes == (tmp_path / "head" / "model.safetensors").stat().st_size
    card = (tmp_path / "head" / "README.md").read_text()
    assert "Licence of the target" in card
    assert f"{outcome.parameters:,} parameters" in card
    assert f"{outcome.measures[-1].length:.2f}" in card
    assert ("the token behind them" in card) is (kind is Kind.MEDUSA and shares)


def test_a_head_begins_with_what_the_target_knows(source: Path) -> None:
    target, vocabulary = load_target(source, "cpu"), DraftVocabulary(torch.arange(64) + 20, 100)  # 64: the width, too
    rows = target.decoder.weights.lm_head[20:84]
    for kind in (Kind.EAGLE3, Kind.MEDUSA):
        config = head_config(target, replace(SETTINGS, kind=kind), 64, [0, 0, 1])
        weights = build_head(config, target, vocabulary, [1.0, 2.0, 4.0, 3.0, 0.5], seed=0).public_state()
        equal = {name for name, weight in weights.items() if weight.shape == rows.shape and weight.equal(rows)}
        assert equal == ({"lm_head.weight"} if kind is Kind.EAGLE3 else {f"{head}.1.weight" for head in range(4)})
        if kind is Kind.EAGLE3:
            assert weights["fc.weight"][:, 128:].diag().mean() == pytest.approx(0.25, abs=0.01)
            assert weights["fc.weight"][:, :64].std() == pytest.approx(0.02, rel=0.1)
            assert weights["fc.weight"][:, 64:128].std() == pytest.approx(0.01, rel=0.1)
    config = head_config(target, replace(SETTINGS, kind=Kind.MEDUSA, shares_lm_head=True), 64, [0, 0, 1])
    head = build_head(config, target, vocabulary, [1.0, 2.0, 4.0, 3.0, 0.5], seed=0)
    assert not head.public_state()["fc.weight"].any()
    assert head.state_dict()["scales"][::64].tolist() == [1.0, 2.0, 4.0, 3.0, 0.5]


class TestPlaces:
    def test_what_a_kill_left_half_written_is_in_nobodys_way(self, source: Path, tmp_path: Path) -> None:
        debris = tmp_path / "head" / "training" / ".abc.unfinished"
        debris.parent.mkdir(parents=True)
        debris.write_text("half")
        train(source, tmp_path / "head", stopped=StopAfter(0))
        assert [path.name for path in debris.parent.iterdir()] == ["run.json"]

    def test_another_target(self, source: Path, tmp_path: Path) -> None:
        train(source, tmp_path / "head", replace(SETTINGS, seconds=3.0))
        other = tmp_path / "other"
        model = llama(num_hidden_layers=3, vocab_size=100)
        model.model.norm.weight.add_(0.5)
        model.save_pretrained(other)
        for another in (other, revision_of(tmp_path / "revision")):
            with pytest.raises(FlashSpecError, match=r"with other weights than .*: choose another --out"):
                train(another, tmp_path / "head", resume=True)

    def test_other_settings(self, source: Path, tmp_path: Path) -> None:
        train(source, tmp_path / "head", replace(SETTINGS, seconds=3.0))
        with pytest.raises(ValueError, match=r"seed is 1, but .* was begun with 0"):
            train(source, tmp_path / "head", replace(SETTINGS, seed=1), resume=True)
        with pytest.raises(ValueError, match=r"kind is medusa, but .* was begun with eagle3"):
            train(source, tmp_path / "head", replace(SETTINGS, kind=Kind.MEDUSA), resume=True)

    def test_other_prompts_or_texts(self, source: Path, tmp_path: Path) -> None:
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a b\n")
        train(source, tmp_path / "head", replace(SETTINGS, seconds=3.0))
        own = "was begun with prompts that the target thinks of"
        with pytest.raises(ValueError, match=rf"this asks for the prompts in prompts.txt \(SHA-256 .*\), but .* {own}"):
            train(source, tmp_path / "head", resume=True, prompts=prompts)
        with pytest.raises(ValueError, match=rf"this asks for the texts in first, but .* {own}"):
            train(source, tmp_path / "head", resume=True, texts=tmp_path / "first")
        run = tmp_path / "head" / "training" / "run.json"
        run.write_text(run.read_text().replace("prompts that the target thinks of", _source_of_texts(prompts, None)))
        prompts.write_text("a c\n")
        with pytest.raises(ValueError, match=r"was begun with the prompts in prompts.txt"):
            train(source, tmp_path / "head", resume=True, prompts=prompts)

    def test_what_failed_before_any_text_was_written_binds_nobody(self, source: Path, tmp_path: Path) -> None:
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a b\n")
        for resume in (False, True):
            with pytest.raises(FlashSpecError, match=r"has no tokenizer to read"):
                train(source, tmp_path / "head", prompts=prompts, resume=resume)
        settings = replace(SETTINGS, seconds=3.0, kind=Kind.MEDUSA)
        assert not train(source, tmp_path / "head", settings, resume=True).interrupted

    def test_a_head_is_kept_though_what_it_was_made_of_is_gone(self, source: Path, tmp_path: Path) -> None:
        out = tmp_path / "head"
        train(source, out, replace(SETTINGS, seconds=3.0))
        shutil.rmtree(out / "training" / "rollouts")
        (out / "training" / "state.safetensors").unlink()
        with pytest.raises(FlashSpecError, match=r"holds a training already"):
            train(source, out)
        for name in ("model.safetensors", "config.json", "README.md"):
            (out / name).rename(out / f"my {name}")
        with pytest.raises(FlashSpecError, match=r"holds other files: choose another --out"):
            train(source, out)

    def test_a_target_that_is_not_there_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(FlashSpecError):
            train(tmp_path / "nowhere", tmp_path / "head")
        assert not (tmp_path / "head").exists()

    def test_a_run_that_says_too_little(self, source: Path, tmp_path: Path) -> None:
        train(source, tmp_path / "head", replace(SETTINGS, seconds=3.0))
        run = tmp_path / "head" / "training" / "run.json"
        run.write_text(run.read_text().replace('"texts"', '"text"'))
        with pytest.raises(FlashSpecError, match=r"run.json does not say its texts: choose another --out"):
            train(source, tmp_path / "head", resume=True)

    def test_another_training_at_work_there(self, source: Path, tmp_path: Path) -> None:
        refused = pytest.raises(FlashSpecError, match=r"another training is at work in .*head: choose another --out")
        with alone(tmp_path / "head" / "training"), refused:
            train(source, tmp_path / "head", replace(SETTINGS, seconds=3.0))
        assert not train(source, tmp_path / "head", replace(SETTINGS, seconds=3.0)).interrupted

    def test_prompts_for_texts_that_are_there(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"give one of the two"):
            train(source, tmp_path / "head", prompts=tmp_path / "a", texts=tmp_path / "b")

    def test_a_target_that_says_nothing(self, tmp_path: Path) -> None:
        model = llama(num_hidden_layers=3, vocab_size=100)
        model.model.norm.weight.fill_(math.nan)
        model.save_pretrained(tmp_path / "target")
        with pytest.raises(FlashSpecError, match=r"the logits of .*target are not finite: it writes no text"):
            train(tmp_path / "target", tmp_path / "head")

    def test_a_file_or_a_strangers_folder(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(FlashSpecError, match=r"is a file; it should be a folder"):
            train(source, tmp_path / "file")
        with pytest.raises(FlashSpecError, match=r"holds a model of another origin: choose another --out"):
            train(source, source, resume=True)
        with pytest.raises(FlashSpecError, match=r"holds other files"):
            train(source, tmp_path)

    def test_a_state_of_another_shape(self, source: Path, tmp_path: Path) -> None:
        train(source, tmp_path / "a", replace(SETTINGS, seconds=3.0))
        train(source, tmp_path / "b", replace(SETTINGS, seconds=3.0, intermediate_size=16))
        state = Path("training") / "state.safetensors"
        (tmp_path / "a" / state).write_bytes((tmp_path / "b" / state).read_bytes())
        with pytest.raises(FlashSpecError, match=r"holds no midlayer.mlp.gate_proj.weight of shape"):
            train(source, tmp_path / "a", replace(SETTINGS, seconds=9.0), resume=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seconds", 0),
        ("seconds", float("nan")),
        ("layers", 0),
        ("unroll", 0),
        ("length", 3),
        ("coverage", 1.5),
        ("writing_share", 1.0),
    ],
)
def test_settings_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        Settings(**{field: value})


def test_a_loss_that_is_not_finite_is_a_sentence(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advice = "take a smaller learning rate than 0.005"
    with monkeypatch.context() as patch:
        patch.setattr(flashspec.training.fit.Fit, "_step", lambda *_: torch.tensor(torch.nan))
        with pytest.raises(FlashSpecError, match=f"the loss is nan after 1 steps: {advice}"):
            train(source, tmp_path / "a")
    monkeypatch.setattr(flashspec.training.fit, "draft_loss", lambda head, *_: torch.nan * head.fc.weight.sum())
    with pytest.raises(FlashSpecError, match=f"the loss on held-out text is nan after 0 steps: {advice}"):
        train(source, tmp_path / "b")


def test_ids_without_a_token_are_never_drafted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(num_hidden_layers=3, vocab_size=100)
    model.save_pretrained(tmp_path / "target")
    monkeypatch.setattr(Target, "writable_ids", 70)
    train(tmp_path / "target", tmp_path / "head", replace(SETTINGS, seconds=3.0))
    texts = RolloutFolder.open(tmp_path / "head" / "training" / "rollouts").load()
    known = SafetensorsFolder(tmp_path / "head").tensor("t2d")
    assert texts.counts(100)[70:].sum() > 0 and known[:70].any() and not known[70:].any()
