from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import MarkovModel
from small_heads import HIDDEN, LAYERS, VOCAB, write_eagle, write_medusa
from small_models import llama

from flashspec.bench import endtoend, methods
from flashspec.bench.endtoend import batches, summarise
from flashspec.bench.methods import Setup, Take, make_method
from flashspec.bench.report import table
from flashspec.bench.shapes import SHAPES, Shape
from flashspec.core import PLAIN, Arm, FlashSpecError, RowStep, StepRecord
from flashspec.drafters import shipped
from flashspec.drafters.heads import target_hash
from flashspec.models.loading import LoadedModel, load_model


def take(tokens: int, seconds: float, steps: int = 0) -> Take:
    records = tuple(StepRecord(PLAIN, (RowStep(0, 0, tokens // steps),), seconds / steps) for _ in range(steps))
    return Take((tuple(range(tokens)),), seconds, records)


def test_speedups_are_medians_of_per_prompt_ratios() -> None:
    rows = summarise(
        "set",
        {
            "hf-float32": [take(10, 10.0), take(10, 10.0), take(10, 10.0)],
            "hf-bfloat16": [take(10, 5.0), take(10, 5.0), take(10, 5.0)],
            "plain": [take(10, 4.0, 10), take(10, 2.0, 10), take(10, 1.0, 10)],
            "auto": [take(10, 1.0, 5), take(10, 1.0, 5), take(10, 1.0, 5)],
        },
        {"hf-float32": 4.0, "hf-bfloat16": 3.0, "plain": 2.0, "auto": 1.23456},
    )
    by_method = {row["method"]: row for row in rows}
    assert by_method["auto"]["speedup_vs_plain"] == 2.0  # of 4, 2, 1
    assert by_method["auto"]["speedup_vs_hf"] == 5.0  # bfloat16 is the faster one
    assert by_method["auto"]["acceptance_length"] == 2.0
    assert by_method["plain"]["tokens_per_second"] == 5.0
    assert by_method["auto"]["first_call_seconds"] == 1.235
    assert by_method["hf-float32"]["acceptance_length"] is None
    assert by_method["auto"]["same_text_as_hf_float32"] == by_method["auto"]["same_text_as_plain"] == 1.0


def test_acceptance_is_that_of_all_answers_together() -> None:
    (row,) = summarise("set", {"auto": [take(10, 1.0, 10), take(10, 1.0, 10), take(40, 1.0, 10)]}, {})
    assert row["acceptance_length"] == 2.0


def test_a_batch_counts_all_its_rows() -> None:
    """Two rows of five tokens in two seconds and five steps; one of them is not what the baseline wrote."""
    steps = tuple(StepRecord(PLAIN, (RowStep(0, 0, 1), RowStep(0, 0, 1)), 0.4) for _ in range(5))
    ours, theirs = ((1, 2, 3, 4, 5), (6, 7, 8, 9, 10)), ((1, 2, 3, 4, 5), (6, 7, 8, 9, 0))
    rows = summarise(
        "set",
        {"plain": [Take(ours, 2.0, steps)], "hf-float32": [Take(theirs, 4.0)]},
        {"plain": 9.0, "hf-float32": 9.0},
        2,
    )
    assert (rows[0]["batch_size"], rows[0]["n"], rows[0]["tokens"], rows[0]["tokens_per_second"]) == (2, 2, 10, 5.0)
    assert (rows[0]["acceptance_length"], rows[0]["same_text_as_hf_float32"]) == (1.0, 0.5)


def test_the_last_batch_is_filled_up() -> None:
    assert batches([[1], [2], [3]], 2) == [[[1], [2]], [[3], [1]]]
    assert batches([[1], [2]], 5) == [[[1], [2], [1], [2], [1]]]


def test_a_ratio_without_its_baseline_is_null() -> None:
    (row,) = summarise("set", {"auto": [take(4, 1.0, 2)]}, {"auto": 1.0})
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
        device="cpu",
        output=output,
        progress=lambda what, fraction: heard.append((what, fraction)),
    )
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    assert [row["method"] for row in result["rows"]] == ["plain", "ngram:2", "auto", "ucb1"]
    assert all(row["n"] == 2 and row["tokens"] == 12 and row["prompts"] == "some" for row in result["rows"])
    lines = output.with_suffix(".csv").read_text().splitlines()
    assert lines[0].startswith("method,prompts,batch_size,n,tokens,") and "arms" not in lines[0] and len(lines) == 5
    assert {"hardware", "versions", "commit", "command", "date"} <= result["provenance"].keys()
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert heard[-1] == ("some", 1.0)
    assert table(result).row_count == 4


def test_a_methods_first_call_is_timed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two prompt sets at two batch sizes, the first of each."""
    loaded = LoadedModel(MarkovModel.random(8, 3), None, (), "markov")
    monkeypatch.setattr(methods, "load_model", lambda *_, **__: loaded)
    monkeypatch.setattr(endtoend, "_encode", lambda prompt, setup: Words().encode(prompt))
    calls: dict[str, int] = {}

    def counted(name: str, setup: Setup) -> methods.Method:
        def method(batch: list[list[int]]) -> Take:
            calls[name] = calls.get(name, 0) + 1
            return Take(tuple((1,) for _ in batch), float(calls[name]))

        return method

    monkeypatch.setattr(endtoend, "make_method", counted)
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text("abc\nhello\n")
    paths, output = [tmp_path / "one.txt", tmp_path / "two.txt"], tmp_path / "result.json"
    result = endtoend.run(
        "markov", [], paths, ["plain", "auto"], max_new_tokens=2, device="cpu", output=output, batch_sizes=[1, 2]
    )
    assert [row["first_call_seconds"] for row in result["rows"]] == [1.0, 1.0, *[None] * 6]
    assert calls == {"plain": 10, "auto": 10}  # two calls ahead of the takes of each set, at each of two sizes


def test_methods_of_transformers_agree_with_plain_decoding(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    setup = Setup.load(str(tmp_path), (str(tmp_path),), "cpu", "float32", 8, 0.0)
    prompts = [[1, 5, 9, 2]]
    names = ("hf-float32", "hf-lookup", "hf-assisted", "plain")
    assert len({make_method(name, setup)(prompts).rows for name in names}) == 1


def test_a_padded_batch_and_a_static_cache_used_twice(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    setup = replace(Setup.load(str(tmp_path), (), "cpu", "float32", 8, 0.0), room=12)
    prompts = [[1, 5, 9, 4], [7, 3]]
    plain = make_method("plain", setup)(prompts).rows
    static = methods._hugging_face(setup, torch.float32, static=True)
    assert make_method("hf-float32", setup)(prompts).rows == plain
    assert static(prompts).rows == static(prompts).rows == plain
    assert static(prompts[1:]).rows == plain[1:]


def test_sampling_by_transformers_is_not_cut(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    setup = Setup.load(str(tmp_path), (), "cpu", "float32", 40, 50.0)  # so hot that every token is as likely
    rows = make_method("hf-float32", setup)([[1, 5, 9, 4]] * 4).rows
    assert len({token_id for row in rows for token_id in row}) > 50


def test_text_ends_with_its_first_stop_token() -> None:
    assert methods._until([5, 2, 0, 0], [2, 3]) == (5, 2)
    assert methods._until([5, 6], []) == (5, 6)


def test_a_widened_target_writes_the_small_ones_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours and transformers', on the widened weights; the small one's weights are rounded to bfloat16 first."""
    monkeypatch.setitem(SHAPES, "wide", Shape("wide", 192, 224, 12, 3, 32, 4, 320))
    llama().bfloat16().save_pretrained(tmp_path)
    small = Setup.load(str(tmp_path), (), "cpu", "float32", 12, 0.0)
    wide = Setup.load(str(tmp_path), (), "cpu", "float32", 12, 0.0, shape="wide")
    prompts = [[1, 5, 9, 4]]
    assert "wide-shaped (widened" in wide.loaded.name
    text = make_method("plain", small)(prompts).rows
    for name in ("plain", "ngram:3", "early-exit:2", "hf-float32"):
        assert make_method(name, wide)(prompts).rows == text
    assert wide.reference(torch.bfloat16).model.rotary_emb.inv_freq.dtype == torch.float32


def test_transformers_speculates_for_one_row_only() -> None:
    with pytest.raises(FlashSpecError, match="'hf-lookup' decodes one prompt at a time"):
        endtoend.run(methods=["plain", "hf-lookup"], batch_sizes=[1, 4])


def markov() -> Setup:
    loaded = LoadedModel(MarkovModel.random(8, 3), None, (), "markov")
    return Setup(("suffix",), {}, loaded, lambda dtype: None, "cpu", "auto", 6, 0.0)


@pytest.mark.parametrize("name", ["hf-float64", "nothing", "hf-assisted", "hf-compiled", "auto@all", "best@arms"])
def test_an_impossible_method_is_one_sentence(name: str) -> None:
    setup = markov()
    with pytest.raises(FlashSpecError, match=name):
        make_method(name, setup)


def test_shares_accepted_by_position() -> None:
    """Drafts of 3, 3 and 1 tokens, of which 2, 0 and 1 were accepted."""
    rows = (RowStep(3, 2, 3), RowStep(3, 0, 1)), (RowStep(1, 1, 2), RowStep(0, 0, 1))
    steps = tuple(StepRecord(Arm("ngram", 3), pair, 0.1) for pair in rows)
    (row,) = summarise("set", {"ngram:3": [Take(((1, 2),), 1.0, steps)]}, {"ngram:3": 1.0})
    assert row["acceptance_per_position"] == [0.667, 0.5, 0.0]
    (row,) = summarise("set", {"plain": [take(4, 1.0, 4)]}, {"plain": 1.0})
    assert row["acceptance_per_position"] is None


@pytest.fixture
def heads(tmp_path: Path) -> dict[str, str]:
    return {
        "target": save_target(tmp_path / "target"),
        "eagle": str(write_eagle(tmp_path / "first")),
        "medusa": str(write_medusa(tmp_path / "second")),
    }


def save_target(folder: Path) -> str:
    llama(VOCAB, num_hidden_layers=LAYERS, max_position_embeddings=128).bfloat16().save_pretrained(folder)
    return str(folder)


TABLE = ["plain", "eagle3:2", "medusa:3", "first:1", "ngram:2", "ucb1@arms", "thompson@arms", "auto@arms", "auto"]


@pytest.mark.parametrize("shape", [None, "wide"])
def test_heads_by_folder_stand_in_one_table(
    heads: dict[str, str], shape: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All write the target's text, widened or not; the selectors play every arm of the run."""
    monkeypatch.setitem(SHAPES, "wide", Shape("wide", 192, 224, 12, 3, 32, LAYERS + 1, 320))
    monkeypatch.setattr(endtoend, "_encode", lambda prompt, setup: [ord(c) % VOCAB for c in prompt])
    (tmp_path / "set.txt").write_text("abcabc\nhello hello\n")
    drafters = [heads["eagle"], heads["medusa"], "suffix"]
    output = tmp_path / "result.json"
    result = endtoend.run(
        heads["target"],
        drafters,
        [tmp_path / "set.txt"],
        TABLE,
        max_new_tokens=24,
        device="cpu",
        dtype="float32",
        shape=shape,
        output=output,
    )
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == TABLE and all(row["same_text_as_plain"] == 1.0 for row in rows.values())
    assert result["settings"]["drafters"] == ["eagle3", "medusa", "suffix"]
    assert {arm["arm"] for arm in rows["ucb1@arms"]["arms"]} == set(TABLE[:5])  # each once, first of all
    assert {arm["arm"] for arm in rows["auto"]["arms"]} <= {
        "plain", *(f"{name}:{length}" for name in ("eagle3", "medusa", "suffix") for length in (2, 4, 6, 15))
    }  # fmt: skip
    assert len(rows["eagle3:2"]["acceptance_per_position"]) == 2
    assert heads["eagle"] not in output.read_text()  # no folder of a machine


@pytest.fixture
def packaged(heads: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The heads come with the package, for the target; the target and their folders."""
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "package")
    monkeypatch.setitem(SHAPES, "wide", Shape("wide", 192, 224, 12, 3, 32, LAYERS + 1, 320))
    own = target_hash(load_model(heads["target"], dtype="float32").model.sample())
    for name, kind in (("eagle", "eagle3"), ("medusa", "medusa")):
        config = json.loads((Path(heads[name]) / "config.json").read_text())
        marks = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "flashspec": {"kind": kind, "target_hash": own}}
        heads[name] = shutil.copytree(heads[name], str(tmp_path / "package" / name))
        (Path(heads[name]) / "config.json").write_text(json.dumps(config | marks))
    return heads


@pytest.mark.parametrize("shape", [None, "wide"])
def test_heads_of_the_package_by_name_are_those_in_its_folders(packaged: dict[str, str], shape: str | None) -> None:
    """Widened as these are; they draft the same."""

    def decode(drafters: list[str] | None, method: str) -> Take:
        setup = Setup.load(packaged["target"], drafters, "cpu", "float32", 20, 5.0, shape=shape)
        return make_method(method, setup)([[1, 5, 9, 4]])

    for method, folder in (("eagle3:3", "eagle"), ("medusa:3", "medusa")):
        named, found = decode(["eagle3", "medusa"], method), decode([packaged[folder]], method)
        assert sum(row.accepted for step in named.steps for row in step.rows) > 3
        assert named.rows == found.rows
        assert [step.rows for step in named.steps] == [step.rows for step in found.steps]
    unasked = Setup.load(packaged["target"], None, "cpu", "float32", shape=shape)
    assert unasked.drafters == ("suffix", "eagle3")
    assert {record.arm.drafter for record in decode(None, "eagle3:2").steps} == {"eagle3"}


def test_a_name_that_means_two_drafters_or_none(heads: dict[str, str], tmp_path: Path) -> None:
    other = str(write_eagle(tmp_path / "third"))
    setup = Setup.load(heads["target"], [heads["eagle"], other], "cpu", "float32")
    assert setup.find("third") == other and setup.find(other) == other and setup.find("ngram") == "ngram"
    assert [setup.short(name) for name in (heads["eagle"], other)] == ["first", "third"]
    with pytest.raises(FlashSpecError, match=r"drafter 'eagle3' may be any of .*first, .*third: name one of these"):
        make_method("eagle3:4", setup)
    with pytest.raises(FlashSpecError, match="drafter 'irst' is unknown: add --drafter"):
        make_method("irst:4", setup)


def test_a_selector_over_no_arms_is_one_sentence() -> None:
    with pytest.raises(FlashSpecError, match="'auto@arms' chooses among the arms of the run: name some"):
        make_method("auto@arms", markov())


def test_the_arm_of_a_drafter_by_name() -> None:
    found = make_method("ngram:3", markov())([[1, 2, 1, 2, 1]])
    assert {record.arm for record in found.steps} == {Arm("ngram", 3)}
    assert torch.tensor(found.rows).max() < 8
