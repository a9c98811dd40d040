"""Text to ids and back as transformers does it, and in pieces."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from small_models import CHAT_TEMPLATE, byte_fallback, byte_level, wrapped

from flashspec.core import FlashSpecError
from flashspec.models.tokenizer import TextStream, Tokenizer

TEXTS = ["the rose", " two  spaces\n\tand 12,345", "naïve – 日本語 🦊🦊👩‍🔬 end", "", "<|im_end|>the<|endoftext|>"]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the fox?"}]
SPECIAL_TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    wrapped(byte_level()).save_pretrained(path)
    return path


def with_template(template: str | None) -> Tokenizer:
    return Tokenizer(byte_level(), SPECIAL_TOKENS, template)


def test_ids_and_text_are_transformers(folder: Path) -> None:
    ours, theirs = Tokenizer.from_folder(folder), wrapped(byte_level())
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == text
    assert ours.vocab_size == len(theirs)
    assert ours.eos_token_id == theirs.eos_token_id == 2


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chats_are_rendered_as_transformers_renders_them(folder: Path, add_generation_prompt: bool) -> None:
    theirs = wrapped(byte_level()).apply_chat_template(
        CHAT, add_generation_prompt=add_generation_prompt, return_dict=False
    )
    assert Tokenizer.from_folder(folder).apply_chat_template(CHAT, add_generation_prompt) == theirs


def test_templates_may_use_what_transformers_offers_them() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}{{ strftime_now('%%') }}{{ eos_token }}"
    )
    chat = [{"role": "tool", "content": "x"}, {"role": "user", "content": "<é>"}]
    theirs = wrapped(byte_level()).apply_chat_template(chat, chat_template=template, tokenize=False)
    assert with_template(template).render_chat(chat) == theirs == '{"role": "user", "content": "<é>"}%<|im_end|>'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "not valid"),
        ("{{ messages.append(1) }}", "cannot render"),
    ],
)
def test_a_template_that_fails_is_one_sentence(template: str | None, message: str) -> None:
    with pytest.raises(FlashSpecError, match=message):
        with_template(template).apply_chat_template(CHAT)


@pytest.mark.parametrize("stored", ["file", "text", "list"])
def test_the_chat_template_is_found_where_it_is_kept(folder: Path, tmp_path: Path, stored: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    config: dict = {"eos_token": {"content": "<|im_end|>"}, "pad_token": None}
    if stored == "file":
        (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    else:
        named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHAT_TEMPLATE}]
        config["chat_template"] = CHAT_TEMPLATE if stored == "text" else named
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>"}


def test_a_damaged_tokenizer_and_half_a_character_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:1000])
    with pytest.raises(FlashSpecError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(FlashSpecError, match="surrogate"):
        with_template(None).encode("\ud83d")


def stream(tokenizer: Tokenizer, ids: list[int], generator: random.Random) -> list[str]:
    pieces, stream = [], TextStream(tokenizer)
    while ids:
        size = generator.choice((1, 1, 2, 5))
        pieces.append(stream.push(ids[:size]))
        ids = ids[size:]
    return [*pieces, stream.flush()]


@pytest.mark.parametrize("backend", [byte_level, byte_fallback])
def test_streamed_pieces_are_whole_and_add_up(backend) -> None:
    tokenizer, generator = Tokenizer(backend(), {}), random.Random(0)
    for text in [*TEXTS, "a 🦊b ab  a\u00e9\u00e9", "🦊" * 40]:
        ids = tokenizer.encode(text)
        pieces = stream(tokenizer, ids, generator)
        assert "".join(pieces) == tokenizer.decode(ids)
        assert "\ufffd" not in "".join(pieces)


def test_streamed_garbage_is_what_decode_makes_of_it() -> None:
    tokenizer, generator = Tokenizer(byte_level(), {}), random.Random(0)
    high = [id_ for token, id_ in byte_level().get_vocab().items() if len(token) == 1 and ord(token) > 126]
    for vocabulary in (range(tokenizer.vocab_size), high):
        for _ in range(50):
            ids = generator.choices(vocabulary, k=60)
            assert "".join(stream(tokenizer, ids, generator)) == tokenizer.decode(ids)


def test_nothing_is_written_before_a_character_is_complete() -> None:
    tokenizer = Tokenizer(byte_level(), {})
    stream = TextStream(tokenizer)
    assert [stream.push([id_]) for id_ in tokenizer.encode("é🦊!")] == ["", "é", "", "", "", "🦊", "!"]


def test_special_tokens_can_be_shown() -> None:
    tokenizer = Tokenizer(byte_level(), {})
    assert TextStream(tokenizer).push([2]) == ""
    assert TextStream(tokenizer, skip_special_tokens=False).push([2]) == "<|im_end|>"


def test_a_token_costs_the_same_however_long_the_text() -> None:
    longest = 0

    class Counting(Tokenizer):
        def decode(self, token_ids, skip_special_tokens=True):
            nonlocal longest
            longest = max(longest, len(token_ids))
            return super().decode(token_ids, skip_special_tokens)

    tokenizer = Counting(byte_level(), {})
    stream = TextStream(tokenizer)
    for token_id in random.Random(0).choices(range(256), k=2000) + [0] * 2000:
        stream.push([token_id])
    assert longest <= 2 * TextStream.HELD + 2
