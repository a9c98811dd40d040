"""`flashspec train-drafter` in a process of its own parts: what it prints, and how it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_models import llama

import flashspec.training
from flashspec.cli.main import run
from flashspec.training import Kind, Outcome, Settings
from flashspec.training.measure import Measure

MEASURE = Measure(60.0, 12_345, 2.5, (0.75, 0.5), 2.25)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Settings, dict[str, object]]]:
    """Training that takes no time; what it was asked for."""
    calls: list[tuple[Settings, dict[str, object]]] = []

    def train(target: str, out: Path, settings: Settings, *, measured, progress, stopped, **options):  # type: ignore
        calls.append((settings, {"target": target, **options}))
        progress("training: loss 3", 0.5)
        progress("training: loss 2", 0.9)
        measured(MEASURE)
        return Outcome(out, settings.kind, 1234, 5_600_000, (MEASURE,), target == "torn")

    monkeypatch.setattr(flashspec.training, "train_drafter", train)
    return calls


def test_a_training_ends_with_a_table(trained, capsys, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    arguments = ["--target", "x", "--kind", "medusa", "--minutes", "2", "--out", str(tmp_path / "o"), "--seed", "3"]
    assert run(["train-drafter", *arguments, "--share-lm-head", "--draft-vocab", "99"]) == 0
    settings, options = trained[0]
    assert settings == Settings(
        kind=Kind.MEDUSA,
        seconds=120.0,
        seed=3,
        draft_vocab=99,
        shares_lm_head=True,
        layers=3,
        unroll=4,
        decay=0.6,
    )
    assert options == {"target": "x", "prompts": None, "texts": None, "device": None, "resume": False}
    shown = capsys.readouterr().err
    assert "60 s        12,345 tokens  held-out loss 2.500  2.25 tokens a step" in shown
    assert shown.startswith("flashspec: training ...\n")
    assert "medusa" in shown
    for figure in ("1,234", "5.6", "2.500", "2.25", "0.75 0.50", f"use it with --drafter {tmp_path / 'o'}"):
        assert figure in shown


def test_the_help_says_for_whom_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train-drafter", "--help"]) == 0
    assert "TARGET is of the Llama family: Llama, Mistral, Qwen2, Qwen3, SmolLM2." in capsys.readouterr().out


def test_resuming_nothing_says_so(trained, capsys, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for there in (False, True):
        assert run(["train-drafter", "--target", "x", "--out", str(tmp_path / "o"), "--resume"]) == 0
        assert ("the training begins there" in capsys.readouterr().err) is not there
        (tmp_path / "o").mkdir(exist_ok=True)


def test_a_training_has_the_minutes_that_it_had_before_or_twenty(trained, tmp_path: Path) -> None:  # type: ignore
    run(["train-drafter", "--target", "x", "--out", str(tmp_path / "new")])
    (tmp_path / "old" / "training").mkdir(parents=True)
    (tmp_path / "old" / "training" / "run.json").write_text('{"seconds": 3600}')
    for more in ([], ["--minutes", "90"]):
        run(["train-drafter", "--target", "x", "--out", str(tmp_path / "old"), "--resume", *more])
    assert [settings.seconds / 60 for settings, _ in trained] == [20, 60, 90]


def test_an_interrupted_training_says_how_to_go_on(trained, capsys, tmp_path: Path) -> None:  # type: ignore
    assert run(["train-drafter", "--target", "torn", "--out", str(tmp_path / "o")]) == 130
    assert "--resume goes on in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--minutes", "0", "--out", "o"], "--minutes is 0; it should be a number above 0"),
        (["--minutes", "nan", "--out", "o"], "--minutes is nan; it should be a number above 0"),
        (["--minutes", "inf", "--out", "o"], "--minutes is inf; it should be a number above 0"),
        (["--out", "o", "--prompts", "nowhere"], "'nowhere' does not exist"),
        ([], "Missing option '--out'"),
        (["--out", "o", "--device", "gpu"], "device is 'gpu'; it should be 'cpu', 'cuda' or 'cuda:N'"),
        (["--out", "o", "--device", "cuda:999"], "device is 'cuda:999'; this machine has"),
        (["--out", "o", "--device", "cuda:99"], "device is 'cuda:99'; this machine has"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    assert run(["train-drafter", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_a_real_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    llama(vocab_size=50).save_pretrained(tmp_path / "target")
    where = ["--target", str(tmp_path / "target"), "--out", str(tmp_path / "head")]
    arguments = [*where, "--device", "cpu", "--kind", "medusa"]
    assert run(["train-drafter", *arguments, "--minutes", "0.05"]) == 0
    assert (tmp_path / "head" / "model.safetensors").exists()
    assert "tokens a step" in capsys.readouterr().err
    assert run(["train-drafter", *arguments, "--minutes", "0.05"]) == 1
    assert "holds a training already: go on with --resume" in capsys.readouterr().err
