from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fakes import MarkovModel
from small_models import llama

from flashspec.bench import endtoend, methods
from flashspec.bench.endtoend import summarise
from flashspec.bench.methods import Setup, Take, make_method
from flashspec.bench.report import table
from flashspec.core import PLAIN, Arm, FlashSpecError, RowStep, StepRecord
from flashspec.models.loading import LoadedModel


def take(tokens: int, seconds: float, steps: int = 0) -> Take:
    records = tuple(StepRecord(PLAIN, (RowStep(0, 0, tokens // steps),), seconds / steps) for _ in range(steps))
    return Take(tuple(range(tokens)), seconds, records)


def test_speedups_are_medians_of_per_prompt_ratios() -> None:
    rows = summarise(
        "set",
        {
            "hf-float32": [take(10, 10.0), take(10, 10.0), take(10, 10.0)],
            "hf-bfloat16": [take(10, 5.0), take(10, 5.0), take(10, 5.0)],
            "plain": [take(10, 4.0, 10), take(10, 2.0, 10), take(10, 1.0, 10)],
            "auto": [take(10, 1.0, 5), take(10, 1.0, 5), take(10, 1.0, 5)],
        },
    )
    by_method = {row["method"]: row for row in rows}
    assert by_method["auto"]["speedup_vs_plain"] == 2.0  # of 4, 2, 1
    assert by_method["auto"]["speedup_vs_hf"] == 5.0  # bfloat16 is the faster one
    assert by_method["auto"]["acceptance_length"] == 2.0
    assert by_method["plain"]["tokens_per_second"] == 5.0
    assert by_method["hf-float32"]["acceptance_length"] is None
    assert by_method["auto"]["same_text_as_hf_float32"] == 1.0


def test_a_ratio_without_its_baseline_is_null() -> None:
    (row,) = summarise("set", {"auto": [take(4, 1.0, 2)]})
    assert row["speedup_vs_plain"] is row["speedup_vs_hf"] is row["same_text_as_hf_float32"] is None


class Words:
    """As much of a tokenizer as a benchmark needs: a character is a token."""

    chat_template = None

    def encode(self, text: str) -> list[int]:
        return [ord(character) % 8 for character in text]


def test_a_run_writes_rows_provenance_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = LoadedModel(MarkovModel.random(8, 3), None, (), "markov")
    monkeypatch.setattr(methods, "load_model", lambda *_, **__: loaded)
    monkeypatch.setattr(endtoend, "_encode", lambda prompt, setup: Words().encode(prompt))
    prompts = tmp_path / "some.txt"
    prompts.write_text("abcabc\nhello\nmore\n")
    heard: list[tuple[str, float | None]] = []
    output = tmp_path / "deep" / "result.json"
    result = endtoend.run(
        "markov",
        ["suffix"],
        [prompts],
        ["plain", "ngram:2", "auto", "ucb1"],
        limit=2,
        max_new_tokens=6,
        output=output,
        progress=lambda what, fraction: heard.append((what, fraction)),
    )
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    assert [row["method"] for row in result["rows"]] == ["plain", "ngram:2", "auto", "ucb1"]
    assert all(row["n"] == 2 and row["tokens"] == 12 and row["prompts"] == "some" for row in result["rows"])
    assert {"hardware", "versions", "commit", "command", "date"} <= result["provenance"].keys()
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert heard[-1] == ("some", 1.0)
    assert table(result).row_count == 4


def test_methods_of_transformers_agree_with_plain_decoding(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    setup = Setup.load(str(tmp_path), (str(tmp_path),), "cpu", "float32", 8, 0.0)
    prompt = [1, 5, 9, 2]
    texts = {
        name: make_method(name, setup)(prompt).token_ids for name in ("hf-float32", "hf-lookup", "hf-assisted", "plain")
    }
    assert len(set(texts.values())) == 1


@pytest.mark.parametrize("name", ["hf-float64", "nothing", "hf-assisted"])
def test_an_impossible_method_is_one_sentence(name: str) -> None:
    setup = Setup(
        "markov", ("suffix",), LoadedModel(MarkovModel.random(8, 3), None, (), "markov"), "cpu", "auto", 4, 0.0
    )
    with pytest.raises(FlashSpecError, match=name):
        make_method(name, setup)


def test_the_arm_of_a_drafter_by_name() -> None:
    setup = Setup(
        "markov", ("suffix",), LoadedModel(MarkovModel.random(8, 3), None, (), "markov"), "cpu", "auto", 6, 0.0
    )
    found = make_method("ngram:3", setup)([1, 2, 1, 2, 1])
    assert {record.arm for record in found.steps} == {Arm("ngram", 3)}
    assert torch.tensor(found.token_ids).max() < 8
