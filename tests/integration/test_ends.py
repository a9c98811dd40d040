"""Where a text ends: limits, stop tokens, stop strings and the context's edge, at every place of a draft window."""

from __future__ import annotations

import pytest
from decoding import EVERY_ARM, Reciter, byte_tokenizer, decode, engine_of, every_drafter, open_run, recite
from fakes import MarkovModel, ScriptedDrafter, greedy_text

PROMPT = [5]
SCRIPT = [5, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]  # the prompt, then ten tokens


def reciting(arms: list[str], stop: list[int] = [], count: int = 10, **settings: object) -> tuple[list[int], str, list]:  # noqa: B006
    """Tokens, finish reason and step records of SCRIPT, decoded with a drafter that knows it."""
    target = Reciter(SCRIPT, 32)
    engine = engine_of(target, [target.drafter()], arms, stop_token_ids=stop, **settings)
    result = engine.generate([PROMPT], count)
    return result.output_ids[0].tolist(), result.finish_reasons[0], result.steps


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("arm", ["plain", "scripted:1", "scripted:4", "scripted:8"])
def test_a_limit_inside_a_draft_window_is_kept(count: int, arm: str) -> None:
    ids, finish, steps = reciting([arm], count=count)
    assert (ids, finish) == (SCRIPT[1 : 1 + count], "length")
    for step in steps:
        assert all(row.accepted <= row.drafted and row.accepted <= row.emitted for row in step.rows)
    assert sum(step.emitted for step in steps) == count


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_limit_inside_a_draft_window_is_kept_by_every_drafter(count: int) -> None:
    target = MarkovModel.random(6, seed=1)
    prompt = [1, 2, 1, 2, 1]
    for arm in EVERY_ARM:
        assert decode(target, [prompt], [arm], every_drafter(target), count, temperature=0) == [
            greedy_text(target, prompt, count)
        ]


# A draft of four covers positions 1..4; the fifth token is the bonus, the sixth the next step's first.
@pytest.mark.parametrize("place", range(1, 11))
@pytest.mark.parametrize("arm", ["plain", "scripted:1", "scripted:4"])
def test_a_stop_token_ends_the_text_wherever_it_stands(place: int, arm: str) -> None:
    ids, finish, _ = reciting([arm], stop=[SCRIPT[place]], count=10)
    assert (ids, finish) == (SCRIPT[1 : place + 1], "stop")


def test_the_first_of_two_stop_tokens_in_a_window_counts() -> None:
    assert reciting(["scripted:4"], stop=[13, 11])[:2] == ([10, 11], "stop")


def test_a_stop_token_behind_the_limit_does_not_count() -> None:
    assert reciting(["scripted:4"], stop=[13], count=3)[:2] == ([10, 11, 12], "length")


def test_a_drafted_stop_token_that_the_target_rejects_does_not_count() -> None:
    target = Reciter(SCRIPT, 32)
    engine = engine_of(target, [ScriptedDrafter(lambda text, n: [10, 31])], ["scripted:2"], stop_token_ids=[31])
    assert engine.generate([PROMPT], 4).output_ids.tolist() == [SCRIPT[1:5]]


def test_end_of_text_tokens_of_the_target_stop_unless_ignored() -> None:
    target = Reciter(SCRIPT, 32)
    engine = engine_of(target, [target.drafter()], ["scripted:4"], eos=[12])
    assert engine.generate([PROMPT], 10).finish_reasons == ["stop"]
    assert engine.generate([PROMPT], 10, ignore_eos=True).output_ids.shape == (1, 10)


@pytest.mark.parametrize("arm", ["plain", "scripted:1", "scripted:4"])
@pytest.mark.parametrize("min_tokens", [1, 3, 4, 6])
def test_min_tokens_puts_a_stop_token_off(arm: str, min_tokens: int) -> None:
    """The target always wants 12; while it must not, the next best token is 0."""
    target = Reciter([5] + [12] * 20, 32)
    engine = engine_of(target, [target.drafter()], [arm], eos=[12], min_tokens=min_tokens)
    result = engine.generate([PROMPT], 10)
    assert result.output_ids.tolist() == [[0] * min_tokens + [12]]
    assert result.finish_reasons == ["stop"]


@pytest.mark.parametrize("arm", ["plain", "scripted:1", "scripted:2", "scripted:4", "scripted:8"])
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("hello world, and more", "wor", "hello "),  # inside a window of 4, across two steps of 1 or 2
        ("hello world, and more", "o w", "hell"),
        ("hello world, and more", "hello", ""),  # from the first token on
        ("aab aab aac!", "aac", "aab aab "),  # begins like the stop string twice before
        ("aaaab and more text", "aab", "aa"),
        ("naïve café – ok", "é", "naïve caf"),  # two bytes, two tokens
        ("naïve café – ok", "é –", "naïve caf"),
        ("a 日本語 z and more", "本", "a 日"),
        ("x 🦊🦊 y and more", "🦊 y", "x 🦊"),
    ],
)
def test_a_stop_string_is_cut_off_wherever_it_falls(arm: str, text: str, stop: str, expected: str) -> None:
    _, engine = recite(text, arms=[arm])
    stream = engine.stream(">", len(text.encode()), stop=(stop,))
    pieces = [chunk.text for chunk in stream]
    result = stream.result()
    assert result.text == "".join(pieces) == expected
    assert result.finish_reasons == ["stop"]
    written = bytes(result.output_ids[0].tolist()).decode()  # up to the token that completed the stop string
    assert written == text[: text.index(stop) + len(stop)]


def test_the_earliest_of_several_stop_strings_counts() -> None:
    _, engine = recite("one two three four")
    assert engine.generate(">", 18, stop=("three", "two", "wo t")).text == "one "


def test_what_might_have_become_a_stop_string_is_written_at_the_end() -> None:
    _, engine = recite("one two thr")
    result = engine.generate(">", 11, stop=("three",))
    assert (result.text, result.finish_reasons) == ("one two thr", ["length"])


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    _, engine = recite("ab🦊")
    assert engine.generate(">", 4).text == "ab\ufffd"


def test_no_piece_of_a_stream_holds_half_a_character() -> None:
    _, engine = recite("é🦊é日本", arms=["scripted:2"])
    pieces = [chunk.text for chunk in engine.stream(">", len("é🦊é日本".encode()))]
    assert "".join(pieces) == "é🦊é日本" and "\ufffd" not in "".join(pieces)


def test_log_probabilities_end_with_the_stop_string() -> None:
    _, engine = recite("hello world")
    result = engine.generate(">", 11, stop=("lo",), logprobs=1)
    assert result.logprobs is not None
    assert [entry.token_id for entry in result.logprobs[0]] == list(b"hello")


@pytest.mark.parametrize("arm", EVERY_ARM)
@pytest.mark.parametrize("room", [1, 2, 3, 5])
def test_a_text_may_fill_the_context_up_to_the_last_slot(arm: str, room: int) -> None:
    context = 16
    target = MarkovModel.random(6, seed=2, max_context=context)
    roomy = MarkovModel(target.table)
    prompt = [1, 2, 3, 4] * 4
    prompt = prompt[: context - room]
    drafters = list(every_drafter(target).values())
    result = engine_of(target, drafters, [arm]).generate([prompt], 100)
    assert result.output_ids.tolist() == [greedy_text(roomy, prompt, room)]
    assert result.finish_reasons == ["length"]


@pytest.mark.parametrize("arm", EVERY_ARM)
def test_a_prompt_of_one_token(arm: str) -> None:
    target = MarkovModel.random(6, seed=3)
    assert decode(target, [[4]], [arm], every_drafter(target), 9, temperature=0) == [greedy_text(target, [4], 9)]


@pytest.mark.parametrize("lag", [0, 1])
def test_rows_that_finish_early_do_not_disturb_the_others(lag: int) -> None:
    target = MarkovModel.random(6, seed=4)
    prompts = [[1], [2, 3, 2, 3, 2, 3, 2], [1, 2, 3, 4, 5], [5, 5]]
    counts = [1, 30, 7, 18]
    rows = decode(target, prompts, EVERY_ARM, every_drafter(target), counts, temperature=0, lag=lag)
    assert rows == [greedy_text(target, prompt, count) for prompt, count in zip(prompts, counts, strict=True)]


def test_a_row_is_recorded_until_it_ends() -> None:
    target = MarkovModel.random(6, seed=4)
    outputs = list(open_run(target, [[1], [2]], ["plain"], {}, [2, 5], temperature=0))
    assert [len(output.record.rows) for output in outputs] == [2, 2, 1, 1, 1]
    assert [output.rows for output in outputs] == [[0, 1], [0, 1], [1], [1], [1]]


def test_rows_of_a_batch_stop_at_their_own_stop_strings() -> None:
    target = Reciter([62, *b"hello world"], 256)
    engine = engine_of(target, [target.drafter()], ["scripted:3"], tokenizer=byte_tokenizer(), stop=("o w",))
    result = engine.generate([">", ">>>>>>>>"], 11)  # the second row joins in at 'orld'
    assert result.texts == ["hell", "orld" + "\0" * 7]
    assert result.finish_reasons == ["stop", "length"]
