"""Text to token ids and back, from a tokenizer.json, without importing transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import tokenizers

from flashspec.core import FlashSpecError
from flashspec.models.checkpoint import read_json

if TYPE_CHECKING:
    import jinja2

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REPLACEMENT = "\ufffd"  # what incomplete UTF-8 decodes to


class Tokenizer:
    """special_tokens: role ('eos_token', ...) -> text of the token. chat_template: jinja source, None: no chats."""

    def __init__(
        self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str], chat_template: str | None = None
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """tokenizer.json, with the special tokens and the chat template beside it."""
        path = folder / "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise FlashSpecError(f"{path} cannot be read as a tokenizer ({error})") from None
        config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        named = {role: config[role] for role in SPECIAL_TOKENS if config.get(role)}
        texts = {role: token["content"] if isinstance(token, dict) else token for role, token in named.items()}
        return cls(backend, texts, _chat_template(folder, config))

    @property
    def eos_token_id(self) -> int | None:
        text = self.special_tokens.get("eos_token")
        return None if text is None else self.backend.token_to_id(text)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise FlashSpecError("the text holds half of a surrogate pair, which no UTF-8 text can") from None
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def encode_question(self, text: str) -> list[int]:
        """As a chat that begins with it where there is a chat template, else as it is."""
        if self.chat_template is None:
            return self.encode(text)
        return self.apply_chat_template([{"role": "user", "content": text}])

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Messages are {'role', 'content'}; FlashSpecError without a template, or where the template refuses them."""
        return self.encode(self.render_chat(messages, add_generation_prompt), add_special_tokens=False)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        import jinja2

        variables = {"messages": messages, "tools": None, "documents": None, **self.special_tokens}
        try:
            return self._template.render(variables, add_generation_prompt=add_generation_prompt)
        except (jinja2.TemplateError, TypeError) as error:
            raise FlashSpecError(f"the model's chat template cannot render these messages: {error}") from None

    @cached_property
    def _template(self) -> jinja2.Template:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self.chat_template is None:
            raise FlashSpecError("this model has no chat template: pass plain text instead of messages")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_tag()]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        try:
            return environment.from_string(self.chat_template)
        except jinja2.TemplateError as error:
            raise FlashSpecError(f"the model's chat template is not valid: {error}") from None


class TextStream:
    """Token ids in, text out as soon as it is certain: characters split over tokens are held back.

    The pieces and the final `flush` together are `decode` of all ids, at a constant cost a token."""

    HELD = 16  # tokens held back at most: a character has four bytes, the rest is no text

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._context: list[int] = []  # tokens already written, which the next ones are decoded behind
        self._written = 0  # characters of the context
        self._held: list[int] = []

    def push(self, token_ids: Iterable[int]) -> str:
        self._held += [token_id for token_id in token_ids if token_id not in self._skipped]
        if not self._held:
            return ""
        text = self._decode(self._context + self._held)
        open_end = text.endswith(_REPLACEMENT)
        if open_end and len(self._held) <= self.HELD:
            return ""
        piece = text[self._written : len(text) - open_end]
        if open_end:
            self._context, self._held = self._held[-4:], []
            self._written = len(self._decode(self._context)) - 1
        elif piece:
            self._context, self._held = self._held, []
            self._written = len(self._decode(self._context))
        return piece

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        text = self._decode(self._context + self._held)[self._written :]
        self._context, self._held, self._written = [], [], 0
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """A file of its own, or a field of tokenizer_config.json: a text, or several with names."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _generation_tag() -> type[jinja2.ext.Extension]:
    """{% generation %}, with which some templates mark the assistant's words: its body, as it is."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class GenerationTag(Extension):
        tags = {"generation"}  # noqa: RUF012, as jinja declares it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return GenerationTag


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=options.pop("ensure_ascii", False), indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _now(format_: str) -> str:
    return datetime.now().strftime(format_)
