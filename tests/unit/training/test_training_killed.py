"""A training whose process is killed goes on from what is on the disk, and that is whole at every moment."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from small_models import llama

from flashspec.drafters.heads import load_head
from flashspec.training.files import SCRATCH, read_tensors
from flashspec.training.rollouts import RolloutFolder
from flashspec.training.target import load_target

COMMAND = (
    "import sys; from flashspec.cli.main import run; from flashspec.training import rollouts; "
    "rollouts.SHARD_TOKENS = 500; sys.exit(run(['train-drafter', *sys.argv[1:]]))"
)
PATIENCE = 60.0


def train(source: Path, out: Path, minutes: float) -> subprocess.Popen[bytes]:
    arguments = ["--target", str(source), "--out", str(out), "--minutes", str(minutes), "--device", "cpu", "--resume"]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments], stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def killed(process: subprocess.Popen[bytes], moment: Callable[[], object]) -> None:
    """SIGKILL as soon as it is the moment, which comes before the process ends by itself."""
    begun = time.monotonic()
    while not moment():
        assert process.poll() is None and time.monotonic() < begun + PATIENCE, "its moment did not come"
    process.kill()
    process.communicate()


def scratch(out: Path) -> list[Path]:
    return list(out.rglob(f".*{SCRATCH}"))


def test_a_killed_training_goes_on(tmp_path: Path) -> None:
    source, out = tmp_path / "target", tmp_path / "head"
    model = llama(vocab_size=100)
    model.lm_head.weight.mul_(6.0)
    model.save_pretrained(source)
    texts, state = out / "training" / "rollouts", out / "training" / "state.safetensors"

    killed(train(source, out, 0.1), lambda: list(texts.glob("shard-*")))  # while it writes
    written = RolloutFolder.open(texts)
    assert written.tokens >= 500 and not (out / "model.safetensors").exists()

    killed(train(source, out, 0.1), state.exists)  # while it saves for the first time
    assert RolloutFolder.open(texts).tokens >= written.tokens
    assert len(read_tensors(state)[1]["position"]["measures"]) == 1

    for folder in (out, texts):  # as a kill leaves it while a file is written
        (folder / f".half{SCRATCH}").write_bytes(b"half")
    before = (out / "model.safetensors").stat().st_mtime_ns if (out / "model.safetensors").exists() else 0
    saved = state.stat().st_mtime_ns

    process = train(source, out, 0.12)
    _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, told
    assert not scratch(out)
    assert state.stat().st_mtime_ns > saved and (out / "model.safetensors").stat().st_mtime_ns > before
    position = read_tensors(state)[1]["position"]
    assert position["steps"] > 0 and position["measures"][0]["tokens"] == 0
    assert load_head(out, load_target(source, "cpu").loaded.model, "head").name == "head"
