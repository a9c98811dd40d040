"""Files that are whole or absent, vocabularies, prompts, texts, batches."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from small_models import byte_level, llama, wrapped, write_gguf
from torch import Tensor

from flashspec.core import FlashSpecError
from flashspec.drafters.heads import target_hash
from flashspec.models.gguf import GgufFile
from flashspec.training.batches import cut, endless, epoch_order, held_out_order, make_batch
from flashspec.training.features import hidden_states
from flashspec.training.files import read_tensors, write_tensors, write_whole
from flashspec.training.prompts import file_prompts, is_sane, own_prompts
from flashspec.training.rollouts import RolloutFolder, Rollouts, Writer, write_rollouts
from flashspec.training.settings import Settings
from flashspec.training.target import Target, load_target
from flashspec.training.vocabulary import DraftVocabulary, choose_vocabulary, coverage_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target")
    llama(vocab_size=330, max_position_embeddings=128).save_pretrained(path)  # ten rows of padding
    wrapped(byte_level()).save_pretrained(path)
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return path


@pytest.fixture(scope="module")
def target(folder: Path) -> Target:
    return load_target(folder, "cpu")


class TestTarget:
    def test_licence_padding_and_hash(self, target: Target, tmp_path: Path) -> None:
        assert target.licence == "apache-2.0"
        assert target.writable_ids == byte_level().get_vocab_size() < target.decoder.vocab_size == 330
        assert target.hash() == target_hash(target.decoder.sample())

    def test_a_gguf_file(self, tmp_path: Path) -> None:
        model = llama(head_dim=16)
        target = load_target(write_gguf(tmp_path / "small.gguf", model), "cpu")
        assert target.revision == GgufFile(tmp_path / "small.gguf").identity
        assert target.licence == ""
        texts = torch.randint(320, (2, 12), generator=torch.Generator().manual_seed(1))
        written = target.loaded.model
        positions = torch.arange(12).expand(2, -1)
        expected = written.logits(written.forward(texts, positions, written.new_cache(2, 12), 12))
        final = hidden_states(target.decoder, texts, [0]).final
        torch.testing.assert_close(target.decoder.logits(final), expected, rtol=1e-3, atol=1e-3)

    def test_a_snapshot_of_the_hub_has_a_revision(self, folder: Path, tmp_path: Path) -> None:
        snapshot = tmp_path / "snapshots" / "0123abcd"
        snapshot.parent.mkdir()
        snapshot.symlink_to(folder, target_is_directory=True)
        assert load_target(snapshot, "cpu").revision == "0123abcd"

    def test_a_model_of_another_family(self, tmp_path: Path) -> None:
        config = tf.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=32)
        tf.GPT2LMHeadModel(config).save_pretrained(tmp_path)
        with pytest.raises(FlashSpecError, match=r"runs through transformers: .* for the Llama family only"):
            load_target(tmp_path, "cpu")


class TestFiles:
    def test_tensors_and_notes_come_back(self, tmp_path: Path) -> None:
        write_tensors(tmp_path / "new" / "file", {"a": torch.arange(3)}, {"b": [1, 2.5]})
        tensors, notes = read_tensors(tmp_path / "new" / "file")
        assert tensors["a"].tolist() == [0, 1, 2]
        assert notes == {"b": [1, 2.5]}

    @pytest.mark.parametrize("step", ["fsync", "replace"])
    def test_a_kill_in_the_middle_of_writing_leaves_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        path = tmp_path / "state"
        write_whole(path, b"old")

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, step, killed)
        with pytest.raises(KeyboardInterrupt):
            write_whole(path, b"new")
        assert path.read_bytes() == b"old"

    def test_a_full_disk_is_one_sentence_and_leaves_no_debris(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "state"
        write_whole(path, b"old")

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(FlashSpecError, match=r"state \(the disk is full\): make room .* --resume"):
            write_whole(path, b"new")
        assert [file.name for file in tmp_path.iterdir()] == ["state"]
        assert path.read_bytes() == b"old"

    def test_a_damaged_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "state").write_bytes(b"xx")
        with pytest.raises(FlashSpecError, match="state cannot be read"):
            read_tensors(tmp_path / "state")


class TestVocabulary:
    def test_d2t_and_t2d_lead_there_and_back(self) -> None:
        vocabulary = DraftVocabulary(torch.tensor([1, 4, 5, 9]), 10)
        assert vocabulary.d2t.tolist() == [1, 3, 3, 6]
        assert vocabulary.t2d.nonzero()[:, 0].tolist() == [1, 4, 5, 9]

    def test_the_most_frequent_tokens_that_cover_enough(self) -> None:
        counts = torch.zeros(1000, dtype=torch.int64)
        counts[500:600] = 98
        counts[:200] = 1
        vocabulary = choose_vocabulary(counts, 0.97, 512, always=[999])
        assert len(vocabulary) == 128  # 100 and the one that ends a text, rounded up
        assert set(range(500, 600)) | {999} < set(vocabulary.ids.tolist())
        assert vocabulary.ids.diff().min() > 0
        assert coverage_of(vocabulary, counts) >= 0.97
        assert len(choose_vocabulary(counts, 1.0, 70)) == 70
        assert len(choose_vocabulary(counts[:30], 1.0, 70)) == 30


class TestPrompts:
    def test_formats_templates_and_repeats(self, tmp_path: Path, target: Target) -> None:
        path = tmp_path / "prompts.jsonl"
        path.write_text('{"turns": ["first", "x"]}\n\n{"prompt": "second"}\nthird line\nthird line\n' + "long " * 99)
        prompts = file_prompts(path, target, 60)
        tokenizer = target.loaded.tokenizer
        assert tokenizer is not None
        assert [tokenizer.decode(prompt) for prompt in prompts] == [
            f"user\n{text}\nassistant\n" for text in ("first", "second", "third line")
        ]

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            ("", "holds 0 different prompts of 1 to 60 tokens; it takes two"),
            ("one\none\n", "holds 1 different prompts"),
            ('one\n{"turns": []}\n', "prompts:2 should be a JSON object with 'turns' or 'prompt'"),
        ],
    )
    def test_files_that_cannot_be_used(self, tmp_path: Path, target: Target, content: str, sentence: str) -> None:
        path = tmp_path / "prompts"
        path.write_text(content)
        with pytest.raises(FlashSpecError, match=sentence):
            file_prompts(path, target, 60)

    def test_questions_stand_where_the_template_has_the_user(self, target: Target) -> None:
        tokenizer = target.loaded.tokenizer
        assert tokenizer is not None
        asked: list[list[int]] = []
        said = ["is it so that we go?", "no", "is it so that we go?", "is it so\ufffd and so?", "aa aa aa aa"]
        answers = iter(said * 2)

        def write(starts: list[list[int]], most: int) -> list[list[int]]:
            asked.extend(starts)
            return [[*tokenizer.encode(next(answers)), 2] for _ in starts]

        source = own_prompts(target, write, 5, 60, seed=3)
        prompts = next(source)
        texts = [tokenizer.decode(start, skip_special_tokens=False) for start in asked]
        assert all(text.startswith("<|im_start|>user\n") for text in texts)
        assert any(text == "<|im_start|>user\n" for text in texts)
        shown = [tokenizer.decode(prompt, skip_special_tokens=False) for prompt in prompts]
        assert shown[0].endswith("is it so that we go?<|im_end|>\n<|im_start|>assistant\n")
        assert len(set(shown)) == len(shown) < 5
        assert next(own_prompts(target, write, 5, 60, seed=3, asked=prompts)) == []

    def test_a_target_that_asks_nothing(self, target: Target) -> None:
        with pytest.raises(FlashSpecError, match="thinks of no question of its own: give it some with --prompts"):
            assert not any(own_prompts(target, lambda starts, most: [[5] for _ in starts], 4, 60, seed=0))

    @pytest.mark.parametrize(
        ("question", "sane"),
        [("What is a rose?", True), ("rose", False), ("a a a a a a b", False), ("what is \x07 that", False)],
    )
    def test_sanity(self, question: str, sane: bool) -> None:
        assert is_sane(question) is sane

    def test_without_a_template_texts_begin_somewhere(self, target: Target) -> None:
        tokenizer = target.loaded.tokenizer
        assert tokenizer is not None
        template, tokenizer.chat_template = tokenizer.chat_template, None
        try:
            batch = next(own_prompts(target, lambda starts, most: [[7, 2] for _ in starts], 50, 60, seed=0))
        finally:
            tokenizer.chat_template = template
        assert all(prompt[0] == 1 and prompt[2:] == [7] for prompt in batch)
        assert all(3 <= prompt[1] < target.writable_ids for prompt in batch)  # neither special nor padding


class TestRollouts:
    def test_writing_stops_with_its_share_of_the_time_and_goes_on_from_there(
        self, tmp_path: Path, target: Target
    ) -> None:
        prompts = tmp_path / "prompts"
        prompts.write_text("\n".join(f"number {index}" for index in range(20)))
        settings = Settings(seconds=100, writing_share=0.5, length=64, rows=8)
        ticks = iter(range(10_000))

        def write(folder: RolloutFolder) -> None:
            write_rollouts(
                target, folder, settings, prompts,
                stopped=lambda: False, progress=lambda what, done: None, clock=lambda: float(next(ticks)),
            )  # fmt: skip

        folder = RolloutFolder.open(tmp_path / "texts")
        write(folder)
        assert 50 <= folder.seconds <= 60
        again = RolloutFolder.open(tmp_path / "texts")
        assert (again.shards, again.seconds, again.prompts, again.tokens) == (
            folder.shards, folder.seconds, folder.prompts, folder.tokens,
        )  # fmt: skip
        write(again)
        assert again.shards == folder.shards

    def test_every_text_is_the_targets_own(self, tmp_path: Path, target: Target) -> None:
        prompts = tmp_path / "prompts"
        prompts.write_text("\n".join(f"number {index}" for index in range(20)))
        settings = Settings(seconds=1e6, length=64, rows=8, most_tokens=2000)
        folder = RolloutFolder.open(tmp_path / "texts")
        write_rollouts(target, folder, settings, prompts, stopped=lambda: False, progress=lambda what, done: None)
        texts = folder.load()
        assert 2000 <= folder.tokens == int((texts.lengths - texts.starts).sum())
        assert {tuple(prompt) for prompt in folder.asked()} == {tuple(p) for p in file_prompts(prompts, target, 32)}
        held_out = texts.held_out.nonzero()[:, 0].tolist()
        assert len(held_out) == 2  # the first and the 17th prompt, each once
        index = held_out[0]
        whole = texts.token_ids[texts.offsets[index] : texts.offsets[index + 1]].long()[None]
        start, length = int(texts.starts[index]), whole.shape[1]
        cache = target.decoder.new_cache(1, length)
        hidden = target.decoder.forward(whole, torch.arange(length)[None], cache, length)
        assert target.decoder.logits(hidden).argmax(-1)[0, start - 1 : -1].equal(whole[0, start:])
        counts = texts.counts(330)
        kept = [texts.written(i) for i in range(len(texts)) if not texts.held_out[i]]
        assert counts.equal(torch.bincount(torch.cat(kept).long(), minlength=330))

    def test_batches_of_answers_are_full_and_never_larger(
        self, tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prompts, asked = tmp_path / "prompts", []
        prompts.write_text("\n".join(f"number {index}" for index in range(50)))

        def write(
            writer: Writer, prompts: list[list[int]], most: int, temperature: float = 1.0, whole: bool = True
        ) -> list[list[int]]:
            asked.append((len(prompts), whole))
            return [[5] * 10] * len(prompts)

        monkeypatch.setattr(Writer, "write", write)
        settings = Settings(seconds=1e6, length=64, rows=8, most_tokens=1000)
        folder = RolloutFolder.open(tmp_path / "texts")
        write_rollouts(target, folder, settings, prompts, stopped=lambda: False, progress=lambda what, done: None)
        assert len(asked) >= 10 and not any(whole for _, whole in asked)
        assert {count for count, _ in asked[1:]} == {8}  # the first text is not waited for
        assert folder.tokens == 10 * sum(count for count, _ in asked)

    @pytest.mark.parametrize(("whole", "steps"), [(True, 5), (False, 4)])
    def test_the_last_quarter_of_a_batch_is_not_waited_for(
        self, target: Target, monkeypatch: pytest.MonkeyPatch, whole: bool, steps: int
    ) -> None:
        taken = []

        class Stream:
            def records(self) -> Iterator[SimpleNamespace]:
                for running in (8, 8, 3, 2, 1):
                    taken.append(running)
                    yield SimpleNamespace(rows=[None] * running)

            def result(self) -> SimpleNamespace:
                return SimpleNamespace(output_ids=torch.tensor([[4, -1]] * 8), finish_reasons=["cancelled"] * 8)

        writer = Writer(target, 64, 0, lambda: False)
        monkeypatch.setattr(writer.engine, "stream", lambda *arguments, **options: Stream())
        assert writer.write([[1]] * 8, 30, whole=whole) == [[4]] * 8
        assert len(taken) == steps

    def test_a_shard_holds_thousands_of_tokens_or_seconds_of_work(self, tmp_path: Path) -> None:
        folder = RolloutFolder.open(tmp_path / "texts")
        for index in range(60):
            folder.add([([1], [index] * 1000, index % 2 == 0)], 1, 0.001)
        assert folder.shards == 60_000 // 17_000
        folder.add([([1], [60] * 1000, False)], 1, 5.0)  # a kill loses no more than this
        assert folder.shards == 4 and RolloutFolder.open(tmp_path / "texts").prompts == 61
        folder.add([([1], [61] * 1000, False)], 1, 0.5)
        assert RolloutFolder.open(tmp_path / "texts").prompts == 61
        folder.flush()
        again = RolloutFolder.open(tmp_path / "texts")
        assert (again.prompts, again.tokens, again.shards) == (62, 62_000, 5)
        assert again.seconds == pytest.approx(folder.seconds)
        texts = again.load()
        assert [int(texts.written(index)[0]) for index in range(62)] == list(range(62))

    def test_too_little_text(self, tmp_path: Path) -> None:
        folder = RolloutFolder.open(tmp_path / "texts")
        with pytest.raises(FlashSpecError, match="wrote no text in its share of the time"):
            folder.load()
        folder.add([([1], [2, 3, 4, 5], True), ([1], [2], False)], 2, 1.0)  # the second is too short to count
        folder.flush()
        with pytest.raises(FlashSpecError, match="1 texts are too few"):
            folder.load()


def texts_of(lengths: list[int], held_out: list[int] = ()) -> Rollouts:  # type: ignore[assignment]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    held: Tensor = torch.zeros(len(lengths), dtype=torch.bool)
    held[list(held_out)] = True
    return Rollouts(torch.arange(sum(lengths), dtype=torch.int32), offsets, torch.ones(len(lengths)).long(), held)


class TestBatches:
    def test_every_text_once_an_epoch_and_the_same_order_every_time(self) -> None:
        texts = texts_of([3, 9, 5, 7, 4, 8, 6], held_out=[2])
        order = epoch_order(texts, 16, seed=1, epoch=0)
        assert sorted(index for batch in order for index in batch) == [0, 1, 3, 4, 5, 6]
        assert order == epoch_order(texts, 16, seed=1, epoch=0) != epoch_order(texts, 16, seed=1, epoch=1)
        assert all(max(texts.lengths[batch]) * len(batch) <= 16 or len(batch) == 1 for batch in order)

    def test_going_on_from_any_place(self) -> None:
        texts = texts_of([3, 9, 5, 7])
        source = endless(texts, 9, 1, 0, 0)
        seen = [next(source) for _ in range(9)]
        for done in range(8):
            epoch, place, _ = seen[done]
            assert next(endless(texts, 9, 1, epoch, place)) == seen[done + 1]

    def test_padding(self) -> None:
        batch = make_batch(texts_of([3, 9]), [1, 0])
        assert batch.token_ids.shape == (2, 16)
        assert batch.token_ids[1].tolist() == [0, 1, 2] + [0] * 13
        assert batch.lengths.tolist() == [9, 3]
        wanted, written = batch.drafted(1)
        assert wanted[0, :6].tolist() == [6, 7, 8, 9, 10, 11]
        assert written[0].tolist() == [True] * 6 + [False] * 10
        assert not written[1].any()

    def test_cut_and_held_out(self) -> None:
        assert cut([0, 1, 2], [4, 4, 9], 9) == [[0, 1], [2]]
        texts = texts_of([5, 6, 7, 8], held_out=[1, 2, 3])
        assert held_out_order(texts, 100, 14) == [[1, 2]]
        assert held_out_order(texts, 100, 1) == [[1]]
