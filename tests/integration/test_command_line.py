"""The command line on a small Llama from disk, in processes of its own where signals and pipes are concerned."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from small_models import byte_level, llama, wrapped

from flashspec.cli.main import run

COMMAND = (sys.executable, "-c", "from flashspec.cli import main; main()")
LONG = 4000  # tokens: more than a test waits for


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "tiny"
    llama(max_position_embeddings=4096, eos_token_id=None, bos_token_id=None).save_pretrained(place)
    wrapped(byte_level()).save_pretrained(place)
    config = json.loads((place / "tokenizer_config.json").read_text())
    (place / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    return place


def start(*arguments: str, **options: object) -> subprocess.Popen[str]:
    """A process whose standard streams are pipes, as text."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*COMMAND, *arguments, "--device", "cpu"], text=True, **{**pipes, **options})


def test_speculation_writes_what_transformers_writes(folder, capsys):
    options = ("--target", str(folder), "--device", "cpu", "--max-new-tokens", "40", "--json", "--raw", "--compare")
    assert run(("generate", "the quick brown fox", *options, "--drafter", "ngram", "--drafter", str(folder))) == 0
    found = json.loads(capsys.readouterr().out)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = byte_level().encode("the quick brown fox").ids
    output = model.generate(torch.tensor([prompt]), max_new_tokens=40)
    assert found["token_ids"] == output[0, len(prompt) :].tolist()
    assert found["plain"]["identical"]
    assert found["acceptance_rate"] > 0


def test_ctrl_c_in_mid_stream(folder):
    process = start("generate", "a", "--target", str(folder), "--max-new-tokens", str(LONG))
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(first) == 20 and rest.endswith("\n")
    assert 0 < int(err.split(" tokens in ")[0].split()[-1]) < LONG
    assert "suffix:15" in err and "Traceback" not in err


def test_a_reader_that_leaves_is_no_fault(folder):
    process = start("generate", "a", "--target", str(folder), "--max-new-tokens", str(LONG), stdin=subprocess.DEVNULL)
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert "Error" not in err and "Exception" not in err


def test_chat_over_pipes(folder):
    process = start("chat", "--target", str(folder), "--max-new-tokens", "8", env={**os.environ, "LC_ALL": "C"})
    out, err = process.communicate("the fox\n/reset\nthe fox\n", timeout=60)
    assert process.returncode == 0
    assert err.count("8 tokens in ") == 2
    assert out and out[: len(out) // 2] == out[len(out) // 2 :]


def damaged(folder, tmp_path, name):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    match name:
        case "truncated":
            weights = broken / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "unsupported":
            (broken / "config.json").write_text('{"model_type": "steam-engine"}')
        case "no config":
            (broken / "config.json").unlink()
        case "missing":
            shutil.rmtree(broken)
        case "no gguf":
            shutil.rmtree(broken)
            broken = tmp_path / "broken.gguf"
            broken.write_bytes(b"GGUF")
    return broken


@pytest.mark.parametrize("name", ["truncated", "unsupported", "no config", "missing", "no gguf"])
def test_a_model_that_cannot_be_loaded_is_one_sentence_that_names_it(folder, tmp_path, capfd, name):
    broken = damaged(folder, tmp_path, name)
    assert run(("generate", "a", "--device", "cpu", "--target", str(broken))) == 1
    out, err = capfd.readouterr()
    said = [line for line in err.splitlines() if not line.endswith(" ...")]
    assert out == "" and len(said) == 1
    assert said[0].startswith("flashspec: ") and str(broken) in said[0]


def test_a_drafter_of_another_vocabulary(folder, tmp_path, capsys):
    llama(vocab_size=64).save_pretrained(tmp_path / "other")
    options = ("--target", str(folder), "--drafter", str(tmp_path / "other"))
    assert run(("generate", "a", "--device", "cpu", *options)) == 2
    assert "has 64 tokens and the target 320" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FLASHSPEC_CACHE", str(tmp_path / "file"))
    assert run(("generate", "a", "--device", "cpu")) == 1
    assert f"cannot write to the cache {tmp_path / 'file'}" in capsys.readouterr().err
