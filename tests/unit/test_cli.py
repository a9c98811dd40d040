"""The command line over a Markov model of letters: what it prints, where, and with which exit status."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tokenizers
import torch
from fakes import MarkovModel, ScriptedDrafter, greedy_text
from tokenizers import decoders, models, pre_tokenizers

from flashspec.cli import terminal
from flashspec.cli.main import run
from flashspec.core import PLAIN, FlashSpecError, RowStep, StepRecord
from flashspec.engine import Chunk, SpeculativeEngine
from flashspec.models.loading import LoadedModel
from flashspec.models.tokenizer import Tokenizer

LETTERS = "abcdefghijklmnopqrstu:"
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% endfor %}"
EXACT = 12  # new tokens in most tests


def letter_tokenizer(chat_template: str | None = TEMPLATE) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, {}, chat_template)


@dataclass
class Shelf:
    """What `load_model` finds, and what it was asked for."""

    models: dict[str, LoadedModel]
    asked: list[str] = field(default_factory=list)

    def load(self, source, *, device, dtype, progress):
        self.asked.append(source)
        progress(f"loading {source}", None)
        if source not in self.models:
            raise FlashSpecError(f"there is no model at {source}")
        return self.models[source]


@pytest.fixture
def shelf(monkeypatch, tmp_path):
    target = MarkovModel.random(len(LETTERS), seed=3)
    small = MarkovModel.random(len(LETTERS), seed=4)
    other = MarkovModel.random(len(LETTERS) + 1, seed=5)
    tokenizer = letter_tokenizer()
    found = Shelf(
        {
            "smollm2": LoadedModel(target, tokenizer, (), "smollm2"),
            "small": LoadedModel(small, tokenizer, (), "small"),
            "other": LoadedModel(other, tokenizer, (), "other"),
            "untaught": LoadedModel(target, letter_tokenizer(None), (), "untaught"),
            "mute": LoadedModel(target, None, (), "mute"),
        }
    )
    monkeypatch.setattr("flashspec.models.loading.load_model", found.load)
    monkeypatch.setattr(terminal, "PATIENCE", 60.0)  # a slow machine's waiting is no part of what is tested
    monkeypatch.setenv("FLASHSPEC_CACHE", str(tmp_path / "cache"))
    return found


@pytest.fixture
def invoke(shelf, capsys, monkeypatch):
    """Exit status, stdout and stderr of a command line."""

    def call(*arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = run(arguments)
        out, err = capsys.readouterr()
        return status, out, err

    return call


def text_after(prompt: str, count: int = EXACT) -> str:
    """What the target writes, plainly."""
    model, tokenizer = MarkovModel.random(len(LETTERS), seed=3), letter_tokenizer()
    return tokenizer.decode(greedy_text(model, tokenizer.encode(prompt), count))


def generate(*arguments: str) -> tuple[str, ...]:
    return ("generate", "--device", "cpu", "--max-new-tokens", str(EXACT), *arguments)


def test_text_goes_to_stdout_and_the_table_to_stderr(invoke):
    status, out, err = invoke(*generate("abc", "--arm", "plain", "--arm", "ngram:4"))
    assert (status, out) == (0, text_after("u:abc") + "\n")
    assert f"{EXACT} tokens in " in err
    assert err.split("arm ")[1].split()[:5] == ["steps", "share", "drafted", "accepted", "tokens/s"]


def test_system_and_raw_prompts(invoke):
    assert invoke(*generate("abc", "--system", "dd"))[1] == text_after("s:ddu:abc") + "\n"
    assert invoke(*generate("abc", "--raw"))[1] == text_after("abc") + "\n"
    assert invoke(*generate("abc", "--target", "untaught"))[1] == text_after("abc") + "\n"


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_a_prompt_from_stdin_loses_one_line_break(invoke, arguments):
    assert invoke(*generate(*arguments), stdin="abc\n")[1] == text_after("u:abc") + "\n"


def test_json_is_one_document_and_nothing_else(invoke):
    arguments = generate("abc", "--json", "--logprobs", "2", "--compare", "--drafter", "small", "--lengths", "3,1,3")
    status, out, err = invoke(*arguments)
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert found["text"] == text_after("u:abc")
    assert found["token_ids"] == letter_tokenizer().encode(found["text"])
    assert (found["finish_reason"], found["tokens"], found["prompt_tokens"]) == ("length", EXACT, 5)
    assert {arm["arm"] for arm in found["arms"]} <= {"plain", "small:3", "small:1"}
    assert sum(arm["share"] for arm in found["arms"]) == pytest.approx(1)
    assert sum(arm["emitted"] for arm in found["arms"]) == EXACT
    assert [token["token_id"] for token in found["logprobs"]] == found["token_ids"]
    assert [len(token["top"]) for token in found["logprobs"]] == [2] * EXACT
    assert found["plain"]["identical"] is True and found["plain"]["tokens"] == EXACT
    ratio = found["tokens_per_second"] / found["plain"]["tokens_per_second"]
    assert found["plain"]["ratio"] == pytest.approx(ratio)


def test_compare_says_that_greedy_text_is_identical(invoke):
    err = invoke(*generate("abc", "--compare"))[2]
    assert f"plain decoding of {EXACT} tokens: " in err
    assert "x as fast, and the text is identical" in err


def test_compare_decodes_as_many_tokens_where_sampled_texts_differ(invoke, shelf):
    loaded = shelf.models["smollm2"]
    shelf.models["smollm2"] = LoadedModel(loaded.model, loaded.tokenizer, (2,), "smollm2")  # 'c' ends a text
    arguments = generate("abc", "--compare", "--json", "--temperature", "1", "--seed", "5", "--min-tokens", "9")
    found = json.loads(invoke(*arguments)[1])
    assert found["plain"]["tokens"] == found["tokens"] >= 9
    err = invoke(*generate("abc", "--compare", "--temperature", "1", "--seed", "5"))[2]
    assert "as fast" in err and "the text" not in err


def test_a_differing_text_is_not_passed_over(invoke, monkeypatch):
    monkeypatch.setattr("flashspec.cli.generate.compare", lambda *_: _COMPARISON)
    assert "but the text differs" in invoke(*generate("abc", "--compare"))[2]


_COMPARISON = {"tokens": EXACT, "tokens_per_second": 1.0, "ratio": 2.0, "identical": False}


def test_no_speculation_loads_no_drafter(invoke, shelf):
    err = invoke(*generate("abc", "--no-speculation", "--drafter", "small"))[2]
    assert "acceptance length" not in err and "plain" in err
    assert shelf.asked == ["smollm2"]


def test_arms_name_their_drafters(invoke, shelf):
    found = json.loads(invoke(*generate("abc", "--json", "--arm", "small:2", "--selector", "fixed"))[1])
    assert [arm["arm"] for arm in found["arms"]] == ["small:2"]
    assert shelf.asked == ["smollm2", "small"]


def test_same_seed_same_sampled_text(invoke):
    options = ("abc", "--temperature", "1.5", "--variant", "coupled", "--seed", "7")
    first = invoke(*generate(*options))[1]
    assert first == invoke(*generate(*options, "--no-speculation"))[1]
    assert first != invoke(*generate("abc", "--temperature", "1.5", "--variant", "coupled", "--seed", "8"))[1]


def test_stop_and_min_tokens(invoke):
    whole = text_after("u:abc")
    stop = next(letter for letter in whole[1:] if letter != whole[0])
    found = json.loads(invoke(*generate("abc", "--json", "--stop", stop))[1])
    assert (found["text"], found["finish_reason"]) == (whole.partition(stop)[0], "stop")


BAD = {
    "temperature": (("--temperature", "-1"), "temperature is -1.0: "),
    "nan": (("--temperature", "nan"), "temperature is nan: "),
    "top_p": (("--top-p", "0"), "top_p is 0.0: "),
    "max_new_tokens": (("--max-new-tokens", "-3"), "'--max-new-tokens': -3 is not in the range x>=1"),
    "lengths": (("--lengths", "4,0"), "'4,0' should be numbers from 1 to 64"),
    "lengths word": (("--lengths", "4,x"), "'4,x' should be numbers from 1 to 64"),
    "arm": (("--arm", "ngram"), "arm 'ngram' should read 'plain' or 'drafter:length'"),
    "arm length": (("--arm", "ngram:0"), "write 'ngram:1' or more"),
    "lengths beside an arm": (("--arm", "ngram:2", "--lengths", "4"), "--lengths says nothing beside --arm"),
    "min_tokens": (("--min-tokens", "13"), "--min-tokens is 13; it should be at most --max-new-tokens, 12"),
    "arm of another drafter": (("--drafter", "suffix", "--arm", "ngram:2"), "names no drafter of this engine"),
    "vocabulary": (("--drafter", "other"), "drafter 'other' has 23 tokens and the target 22"),
    "model without a model": (("--drafter", "model"), "needs a model"),
    "device": (("--device", "cuda:99"), "device is 'cuda:99'; this machine has cpu"),
    "device word": (("--device", "gpu"), "device is 'gpu'; it should be"),
    "seed": (("--seed", "-1"), "seed is -1: "),
    "stop": (("--stop", ""), "stop holds an empty string"),
    "fixed": (("--selector", "fixed", "--lengths", "2,4"), "selector 'fixed' plays one arm"),
    "compare": (("--compare", "--no-speculation"), "nothing to compare"),
    "logprobs": (("--logprobs", "1"), "--logprobs needs --json"),
    "raw system": (("--raw", "--system", "a"), "drop --raw"),
    "untaught system": (("--target", "untaught", "--system", "a"), "this target has none"),
    "number": (("--top-k", "many"), "'many' is not a valid integer; see 'flashspec generate --help'"),
    "option": (("--bogus",), "'--bogus'"),
    "mute": (("--target", "mute"), "prompt is text, but this engine has no tokenizer"),
    "context": (("a" * 600,), "context of 512"),
}


@pytest.mark.parametrize("arguments, sentence", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_sentence(invoke, arguments, sentence):
    prompt = () if sentence == "context of 512" else ("abc",)
    status, out, err = invoke(*generate(*prompt, *arguments))
    assert (status, out) == (2, "")
    assert err.startswith("flashspec: ") and sentence in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("--target", "nowhere"), "there is no model at nowhere"),
        (("--drafter", "nowhere"), "drafter 'nowhere' is none of eagle3, early-exit, medusa, model, ngram, suffix"),
    ],
)
def test_what_cannot_be_had_exits_1(invoke, arguments, sentence):
    status, out, err = invoke(*generate("abc", *arguments))
    assert (status, out) == (1, "")
    assert err.startswith("flashspec: ") and sentence in err and err.count("\n") == 1


def test_settings_are_checked_before_anything_is_loaded(invoke, shelf):
    invoke(*generate("abc", "--temperature", "-1"))
    assert shelf.asked == []


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt(invoke, prompt):
    assert invoke(*generate(prompt))[::2] == (2, "flashspec: the prompt is empty; give it some text\n")
    assert invoke(*generate("-"), stdin=prompt)[0] == 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_not_read_for_a_prompt(shelf, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal("abc\n"))
    assert run(generate()) == 2
    assert "give a prompt, or pipe one to stdin" in capsys.readouterr().err


def raising(error: BaseException):
    def fail(*_: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "error, status, sentence",
    [
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (UnicodeDecodeError("utf-8", b"a\xff", 1, 2, "invalid start byte"), 2, "not UTF-8 text: invalid start byte"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "there is not enough memory: take"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "GPU's memory is full: end what else runs on it, or"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_foreseeable_faults(invoke, monkeypatch, error, status, sentence):
    monkeypatch.setattr("flashspec.cli.generate._read_prompt", raising(error))
    found, out, err = invoke(*generate("abc"))
    assert (found, out) == (status, "")
    assert sentence in err and err.count("\n") == bool(sentence)


def test_a_fault_of_our_own_is_not_hidden(invoke, monkeypatch):
    monkeypatch.setattr("flashspec.cli.generate._read_prompt", raising(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError):
        invoke(*generate("abc"))


def test_a_drafter_that_fails_is_one_line_behind_the_text(invoke, monkeypatch):
    broken = ScriptedDrafter(raising(RuntimeError("no more ideas")))
    monkeypatch.setattr("flashspec.engine.arms.make_drafter", lambda *_: broken)
    status, out, err = invoke(*generate("abc", "--arm", "scripted:2", "--selector", "fixed"))
    assert (status, out) == (0, text_after("u:abc") + "\n")
    assert err.startswith("flashspec: drafter 'scripted' is set aside for this request: RuntimeError: no more ideas\n")


def test_only_runtime_warnings_reach_the_user(invoke, monkeypatch):
    def warn_of_both(prompt):
        warnings.warn("an arm is out", RuntimeWarning, stacklevel=1)
        warnings.warn("some library moves a function", UserWarning, stacklevel=1)
        return prompt

    monkeypatch.setattr("flashspec.cli.generate._read_prompt", warn_of_both)
    err = invoke(*generate("abc"))[2]
    assert err.startswith("flashspec: an arm is out\n") and "library" not in err


def test_logits_that_are_not_finite_end_the_text_and_say_so(invoke, shelf):
    table = MarkovModel.random(len(LETTERS), seed=3).table
    table[:] = torch.nan
    shelf.models["smollm2"] = LoadedModel(MarkovModel(table), letter_tokenizer(), (), "smollm2")
    status, _, err = invoke(*generate("abc", "--arm", "plain"))
    assert status == 1 and "the target's logits are not finite" in err
    status, out, err = invoke(*generate("abc", "--arm", "ngram:2", "--compare", "--json"))
    assert status == 1 and "the target's logits are not finite" in err and json.loads(out)["tokens"] == 0
    assert "the target's logits are not finite" in invoke("chat", "--device", "cpu", "--arm", "plain", stdin="a\n")[2]


def interrupting(monkeypatch, after: int, presses: int = 1) -> None:
    """Ctrl-C on the way out of the engine's step number `after`."""
    stream = SpeculativeEngine.stream

    def pressed(self, *arguments, **options):
        generation = stream(self, *arguments, **options)
        decode = generation._chunks

        def chunks():
            for count, chunk in enumerate(decode, 1):
                for _ in range(presses if count == after else 0):
                    terminal.signal.raise_signal(terminal.signal.SIGINT)
                yield chunk

        generation._chunks = chunks()
        return generation

    monkeypatch.setattr(SpeculativeEngine, "stream", pressed)


def test_ctrl_c_keeps_the_text_so_far(invoke, monkeypatch):
    interrupting(monkeypatch, after=3)
    status, out, err = invoke(*generate("abc", "--arm", "plain", "--compare", "--raw"))
    assert (status, out) == (130, text_after("abc", 3) + "\n")
    assert "3 tokens in " in err and "plain decoding" not in err
    status, out, _ = invoke(*generate("abc", "--raw", "--json", "--no-speculation"))
    assert (status, json.loads(out)["finish_reason"]) == (130, "cancelled")


def test_a_second_ctrl_c_does_not_wait_for_the_step(invoke, monkeypatch):
    interrupting(monkeypatch, after=3, presses=2)
    status, out, _ = invoke(*generate("abc", "--raw", "--no-speculation"))
    assert (status, out) == (130, text_after("abc", 2) + "\n")


def test_chat_answers_a_line_at_a_time_and_remembers(invoke):
    status, out, err = invoke("chat", "--device", "cpu", "--max-new-tokens", "5", stdin="abc\n\nde\n")
    first = text_after("u:abc", 5)
    assert (status, out) == (0, f"{first}\n{text_after(f'u:abca:{first}u:de', 5)}\n")
    assert err.count("5 tokens in ") == 2


def test_chat_commands(invoke):
    lines = "abc\n/reset\nabc\n/system dd\nabc\n/what\n/exit\nabc\n"
    out, err = invoke("chat", "--device", "cpu", "--max-new-tokens", "5", stdin=lines)[1:]
    fresh, with_system = text_after("u:abc", 5), text_after("s:ddu:abc", 5)
    assert out.split() == [fresh, fresh, with_system]
    assert "flashspec: there is no /what; /reset starts over" in err


def test_chat_needs_a_chat_template(invoke):
    status, _, err = invoke("chat", "--device", "cpu", "--target", "untaught", stdin="abc\n")
    assert (status, err) == (
        1,
        "flashspec: untaught has no chat template: 'flashspec generate' continues plain text\n",
    )


def test_a_message_that_is_too_long_ends_a_piped_chat(invoke):
    status, out, err = invoke("chat", "--device", "cpu", stdin="a" * 600 + "\nabc\n")
    assert (status, out) == (2, "") and "context of 512" in err


def test_at_a_terminal_chat_goes_on(shelf, capsys, monkeypatch):
    script = iter(["a" * 600, KeyboardInterrupt, "abc", EOFError])

    def type_line(prompt: str) -> str:
        assert prompt == "> "
        line = next(script)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", type_line)
    assert run(("chat", "--device", "cpu", "--max-new-tokens", "5")) == 0
    out, err = capsys.readouterr()
    assert out.split() == [text_after("u:abc", 5)]  # the message that failed is forgotten
    assert "smollm2: /reset starts over" in err and "context of 512" in err


def test_ctrl_c_ends_an_answer_that_stays_in_the_conversation(invoke, monkeypatch):
    interrupting(monkeypatch, after=3)
    options = ("chat", "--device", "cpu", "--max-new-tokens", "5", "--no-speculation")
    status, out, _ = invoke(*options, stdin="abc\nde\n")
    first = text_after("u:abc", 3)
    assert (status, out) == (0, f"{first}\n{text_after(f'u:abca:{first}u:de', 3)}\n")


def test_ctrl_c_at_a_piped_prompt_leaves(invoke, monkeypatch):
    monkeypatch.setattr("builtins.input", raising(KeyboardInterrupt()))
    assert invoke("chat", "--device", "cpu")[0] == 130


def test_models_lists_the_cache_and_the_drafters(invoke, tmp_path):
    out = invoke("models")[1]
    assert f"nothing is cached in {tmp_path / 'cache' / 'models'}" in out
    folder = tmp_path / "cache" / "models" / "Tiny"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(2_500_000))
    for name in ("gguf-1", "gguf-2"):
        (folder.parent / name).mkdir()
        (folder.parent / name / "weights").write_bytes(bytes(500_000))
    out = invoke("models")[1]
    assert out.startswith(f"{tmp_path / 'cache' / 'models'}\n")
    assert ["Tiny", "2.5"] in [line.split() for line in out.splitlines()]
    assert out.count("GGUF") == 1 and "1.0" in out
    assert "eagle3, early-exit, medusa, ngram, suffix" in out


def test_bench_passes_on_what_was_named(invoke, monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr("flashspec.bench.endtoend.run", lambda **options: asked.update(options) or "result")
    monkeypatch.setattr("flashspec.bench.report.table", lambda result: f"the table of {result}")
    prompts, output = tmp_path / "prompts.txt", tmp_path / "new" / "result.json"
    prompts.write_text("abc\n")
    options = ("--prompts", str(prompts), "--methods", "plain, auto", "--limit", "2", "--output", str(output))
    status, out, err = invoke("bench", "endtoend", *options, "--drafter", "small")
    assert (status, out, err) == (0, "the table of result\n", "")
    assert output.parent.is_dir() and asked.pop("progress") is not None
    assert asked == {
        "target": "smollm2",
        "dtype": "auto",
        "drafters": ("small",),
        "prompts": (prompts,),
        "methods": ["plain", "auto"],
        "limit": 2,
        "max_new_tokens": 128,
        "temperature": 0.0,
        "output": output,
    }


@pytest.mark.parametrize(
    "options, sentence",
    [
        (("--prompts", "nowhere.txt"), "'nowhere.txt' does not exist"),
        (("--limit", "0"), "0 is not in the range"),
        (("--max-new-tokens", "0"), "0 is not in the range"),
        (("--output", "x.csv"), "'x.csv' should end in .json"),
        (("--output", "x.png"), "'x.png' should end in .json"),
        (("--methods", " ,"), "' ,' names no method"),
    ],
)
def test_bench_refuses(invoke, options, sentence, monkeypatch):
    monkeypatch.setattr("flashspec.bench.endtoend.run", raising(AssertionError("it was measured")))
    status, _, err = invoke("bench", "endtoend", *options)
    assert status == 2 and sentence in err and err.count("\n") == 1


def test_bench_wants_a_shape_for_random_weights(invoke):
    status, _, err = invoke("bench", "steps", "--random")
    assert status == 2 and "--random needs --shape" in err and err.count("\n") == 1
    status, _, err = invoke("bench", "steps", "--random", "--shape", "1b", "--target", "smollm2")
    assert status == 2 and "--random weights are no --target's" in err and err.count("\n") == 1


def test_bench_tries_to_write_before_it_measures(invoke, monkeypatch, tmp_path):
    def measure(output, **options):
        assert not list(output.parent.iterdir())  # what was tried is gone
        return "result"

    monkeypatch.setattr("flashspec.bench.report.table", str)
    monkeypatch.setattr("flashspec.bench.endtoend.run", measure)
    assert invoke("bench", "endtoend", "--output", str(tmp_path / "new" / "x.json"))[::2] == (0, "")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("flashspec.bench.endtoend.run", raising(AssertionError("it was measured")))
    for place in (Path("/proc/x.json"), tmp_path / "file" / "x.json"):
        status, _, err = invoke("bench", "endtoend", "--output", str(place))
        assert status == 1 and f"--output {place} cannot be written: " in err and err.count("\n") == 1


def test_help_and_version(invoke):
    from flashspec import __version__

    assert invoke("--version") == (0, f"flashspec {__version__}\n", "")
    for arguments in ((), ("-h",), ("--help",)):
        status, out, _ = invoke(*arguments)
        assert status == 0 and all(name in out for name in ("generate", "chat", "bench", "models"))
    assert invoke("bench")[::2] == (2, "flashspec: Missing command; see 'flashspec bench --help'\n")


def test_python_runs_the_package():
    command = [sys.executable, "-m", "flashspec", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("flashspec ")


def test_help_imports_nothing_heavy():
    code = "import sys; from flashspec.cli.main import run; run(['generate', '--help']); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "pydantic", "rich.console", "numpy"} & set(loaded)


def test_main_exits_with_the_status(capsys, monkeypatch):
    from flashspec.cli import main

    monkeypatch.setattr(sys, "argv", ["flashspec", "--version"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0


def test_waiting_says_nothing_while_it_is_short(capsys):
    with terminal.Waiting() as waiting:
        waiting("converting", 0.5)
    assert capsys.readouterr() == ("", "")


def test_waiting_is_a_line_where_stderr_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "PATIENCE", 0.02)
    with terminal.Waiting() as waiting:
        time.sleep(0.1)  # the imports are no news
        waiting("loading")
        time.sleep(0.1)
        for hundredth in range(100):
            waiting("downloading", hundredth / 100)
        time.sleep(0.1)
    assert capsys.readouterr().err == "flashspec: loading ...\nflashspec: downloading ...\n"


def test_waiting_is_a_bar_at_a_terminal(monkeypatch):
    from rich.console import Console

    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=80)
    monkeypatch.setattr(terminal, "stderr", lambda: console)
    monkeypatch.setattr(terminal, "PATIENCE", 0.02)
    with terminal.Waiting() as waiting:
        time.sleep(0.2)
        waiting("downloading [a/b]", 0.5)
        time.sleep(0.2)
    assert "starting" in shown.getvalue() and "downloading [a/b]" in shown.getvalue()
    assert shown.getvalue().endswith("\x1b[2K")  # the bar is wiped out


def test_a_prompt_that_takes_long_to_read_says_so(capsys, monkeypatch):
    def slow():
        time.sleep(0.1)
        yield Chunk(0, (1,), "late", StepRecord(PLAIN, (RowStep(0, 0, 1),), 0.1))

    monkeypatch.setattr(terminal, "PATIENCE", 0.02)
    assert terminal.write(slow()) is False
    assert capsys.readouterr() == ("late\n", "flashspec: reading the prompt ...\n")
