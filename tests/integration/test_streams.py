"""Streams, threads and conversations: who holds the engine, and what is kept between turns."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from decoding import EVERY_ARM, Reciter, TakingTurns, byte_tokenizer, engine_of, every_drafter, recite
from fakes import MarkovModel, greedy_text

from flashspec.core import StepRecord
from flashspec.engine import Chunk, SpeculativeEngine

TARGET = MarkovModel.random(6, seed=41)


def test_a_stream_adds_up_to_what_generate_returns() -> None:
    _, engine = recite("héllo wörld", arms=["scripted:3", "plain"])
    whole = engine.generate([">", ">"], 13, logprobs=1)
    stream = engine.stream([">", ">"], 13, logprobs=1)
    chunks = list(stream)
    for row in (0, 1):
        mine = [chunk for chunk in chunks if chunk.row == row]
        assert whole.texts is not None and "".join(chunk.text for chunk in mine) == whole.texts[row] == "héllo wörld"
        assert [i for chunk in mine for i in chunk.token_ids] == whole.output_ids[row].tolist()
        assert whole.logprobs is not None and [e for chunk in mine for e in chunk.logprobs] == whole.logprobs[row]
        assert [chunk.finish_reason for chunk in mine] == [None] * (len(mine) - 1) + ["length"]
    result = stream.result()
    assert result.texts == whole.texts and result.logprobs == whole.logprobs
    assert isinstance(chunks[0], Chunk) and isinstance(chunks[0].record, StepRecord)


def test_a_half_read_stream_is_cancelled() -> None:
    _, engine = recite("hello world", arms=["scripted:3"])
    stream = engine.stream(">", 11)
    for chunk in stream:
        assert chunk.text == "hell"
        break
    result = stream.result()
    assert (result.text, result.finish_reasons) == ("hell", ["cancelled"])
    assert list(stream) == []


def test_a_half_read_stream_gives_what_was_held_back() -> None:
    _, engine = recite("hello world", arms=["scripted:3"])
    stream = engine.stream(">", 11, stop=("lloyd",))
    assert next(iter(stream)).text == "he"
    assert stream.result().text == "hell"


def test_an_unread_stream_is_empty() -> None:
    result = engine_of(TARGET).stream([[1], [2]], 5).result()
    assert result.output_ids.shape == (2, 0) and result.finish_reasons == ["cancelled", "cancelled"]
    assert (result.acceptance_rate, result.acceptance_length, result.tokens_per_second) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="no tokenizer"):
        result.text  # noqa: B018


def test_leaving_a_stream_early_frees_the_engine() -> None:
    engine = engine_of(TARGET)
    kept = engine.stream([[1]], 20)
    for stream in (kept, engine.stream([[1]], 20)):
        for _ in stream:
            break
        assert engine.generate([[1]], 3).n_tokens_generated == 3


def test_result_frees_the_engine_under_an_open_loop() -> None:
    engine = engine_of(TARGET)
    stream = engine.stream([[1]], 20)
    chunks = iter(stream)
    next(chunks)
    assert stream.result().finish_reasons == ["cancelled"]
    assert engine.generate([[1]], 3).n_tokens_generated == 3
    assert list(chunks) == []


def test_a_second_call_beside_an_unfinished_stream_is_an_error_and_no_deadlock() -> None:
    engine = engine_of(TARGET)
    stream = iter(engine.stream([[1]], 20))
    next(stream)
    with pytest.raises(RuntimeError, match="unfinished"):
        engine.generate([[1]], 3)
    assert sum(len(chunk.token_ids) for chunk in stream) == 19  # the first goes on
    assert engine.generate([[1]], 3).n_tokens_generated == 3


def test_threads_wait_for_each_other() -> None:
    engine = engine_of(TARGET, list(every_drafter(TARGET).values()), EVERY_ARM)
    texts: dict[int, list] = {}

    def work(first: int) -> None:
        texts[first] = [engine.generate([[first]], 15).output_ids[0].tolist() for _ in range(3)]

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert texts == {first: [greedy_text(TARGET, [first], 15)] * 3 for first in range(4)}


def test_a_thread_waits_for_another_threads_stream() -> None:
    engine = engine_of(TARGET)
    stream: Iterator = iter(engine.stream([[1]], 5))
    next(stream)
    waiting = threading.Thread(target=engine.generate, args=([[2]], 3))
    waiting.start()
    time.sleep(0.05)
    assert waiting.is_alive()
    list(stream)
    waiting.join(timeout=30)
    assert not waiting.is_alive()


# Conversations


def chatting(answers: list[str]) -> tuple[Reciter, SpeculativeEngine]:
    """A target that says the answers in turn to the messages 'q0', 'q1', ..., each ended by '#'."""
    script = "".join(f"u:q{i}\na:{answer}\n" for i, answer in enumerate(answers))
    target = Reciter(script.encode(), 256)
    engine = engine_of(target, [target.drafter()], ["scripted:4"], tokenizer=byte_tokenizer(), stop=("\n",))
    return target, engine


def test_a_conversation_keeps_its_messages_and_its_cache() -> None:
    target, engine = chatting(["first answer", "second one", "third"])
    talk = engine.conversation()
    reads = []
    for number, answer in enumerate(["first answer", "second one", "third"]):
        before = target.reads
        assert "".join(chunk.text for chunk in talk.send(f"q{number}", 20)) == answer
        reads.append(target.reads - before)
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 3
    assert [message["content"] for message in talk.messages[1::2]] == ["first answer", "second one", "third"]
    # The last turn's prompt has 51 tokens; read anew are what was not in the answer before and the five of 'third'.
    whole = len("u:q0\na:first answer\nu:q1\na:second one\nu:q2\na:")
    assert reads[2] < whole
    assert reads[2] <= len("\nu:q2\na:") + 2 * 5 + len("third\n")


def test_a_conversation_decodes_what_a_fresh_request_would() -> None:
    """With a target that notices a wrong cache, and drafters that keep one."""
    target = MarkovModel.random(128, seed=42)
    tokenizer = byte_tokenizer()
    engine = engine_of(target, [MarkovModel(target.table), "ngram"], ["MarkovModel:3", "ngram:2"], tokenizer=tokenizer)
    talk = engine.conversation("be brief")
    for message in ("hello", "and now?", "x"):
        list(talk.send(message, 30))
        kept = talk.last.result().output_ids.tolist()
        assert kept == engine.generate(talk.messages[:-1], 30).output_ids.tolist()


def test_a_message_that_is_refused_leaves_the_conversation_as_it_was() -> None:
    _, engine = chatting(["yes"])
    talk = engine.conversation()
    with pytest.raises(ValueError, match="prompt 0 has"):
        talk.send("q" * 600)  # nobody reads the answer
    assert talk.messages == []
    assert "".join(chunk.text for chunk in talk.send("q0", 20)) == "yes"


def test_a_question_is_asked_before_its_answer_is_read() -> None:
    _, engine = chatting(["yes"])
    talk = engine.conversation()
    answer = talk.send("q0", 20)
    assert talk.messages == [{"role": "user", "content": "q0"}] and talk.last.prompts
    assert "".join(chunk.text for chunk in answer) == "yes"
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]


def test_an_answer_left_early_joins_the_messages() -> None:
    _, engine = chatting(["first answer"])
    talk = engine.conversation()
    answer = talk.send("q0", 20)
    next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert talk.messages[-1] == {"role": "assistant", "content": "first"}


def test_a_conversation_goes_on_exactly_after_an_answer_left_early() -> None:
    target = MarkovModel.random(128, seed=44)
    engine = engine_of(
        target, [MarkovModel(target.table), "ngram"], ["MarkovModel:3", "ngram:2"], tokenizer=byte_tokenizer()
    )
    talk = engine.conversation()
    for number, _ in enumerate(talk.send("hello", 30)):
        if number == 3:
            break
    list(talk.send("and now?", 30))
    assert talk.last.result().output_ids.tolist() == engine.generate(talk.messages[:-1], 30).output_ids.tolist()


def test_a_conversation_forgets_the_cache_of_a_drafter_that_failed() -> None:
    target = MarkovModel.random(128, seed=43)
    short = MarkovModel(target.table, max_context=40)
    engine = engine_of(target, [short, "ngram"], ["MarkovModel:3", "ngram:2"], tokenizer=byte_tokenizer())
    engine.selector = TakingTurns(2)
    talk = engine.conversation()
    with pytest.warns(RuntimeWarning, match="outgrown"):
        for message in ("hello", "and now?"):
            list(talk.send(message, 30))
            assert talk.last.result().output_ids.tolist() == engine.generate(talk.messages[:-1], 30).output_ids.tolist()


def test_a_conversation_forgets_what_was_read_when_the_target_failed() -> None:
    """One forward spoils the cache and ends the answer; the next question is answered as if nothing had been."""

    class Failing(MarkovModel):
        failing = False

        def forward(self, token_ids, positions, cache, *arguments, **options):  # type: ignore[no-untyped-def]
            hidden = super().forward(token_ids, positions, cache, *arguments, **options)
            if self.failing:
                cache.keys.fill_(7.0)
            return hidden

        def logits(self, hidden):  # type: ignore[no-untyped-def]
            return super().logits(hidden) * (float("nan") if self.failing else 1.0)

    target = Failing.random(128, seed=45)
    engine = engine_of(target, tokenizer=byte_tokenizer())
    talk = engine.conversation()
    for message, target.failing in (("hello", False), ("and now?", True), ("again", False)):
        list(talk.send(message, 20))
        answer = talk.last.result()
        assert (answer.finish_reasons[0] == "error") is target.failing
    assert answer.output_ids.tolist() == engine.generate(talk.messages[:-1], 20).output_ids.tolist()


def test_a_question_has_to_wait_for_the_answer_that_is_being_read() -> None:
    _, engine = chatting(["first answer", "second one"])
    talk = engine.conversation()
    answer = talk.send("q0", 20)
    first = next(answer).text
    with pytest.raises(RuntimeError, match="still being read"):
        talk.send("q1", 20)
    assert first + "".join(chunk.text for chunk in answer) == "first answer"
    assert [message["content"] for message in talk.messages] == ["q0", "first answer"]
    assert "".join(chunk.text for chunk in talk.send("q1", 20)) == "second one"
