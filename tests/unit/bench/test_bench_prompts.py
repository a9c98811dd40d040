from pathlib import Path

import pytest

from flashspec.bench.prompts import SMALL, load_prompts
from flashspec.core import FlashSpecError


def test_turns_prompt_and_plain_lines(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"turns": ["first", "second"]}\n\n{"prompt": "third"}\nplain text\n')
    assert load_prompts(path).prompts == ("first", "third", "plain text")
    assert load_prompts(path).name == "mixed"


def test_a_limit_spreads_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(str(i) for i in range(10)))
    assert load_prompts(path, 3).prompts == ("0", "3", "6")
    assert len(load_prompts(path, 99).prompts) == 10
    assert SMALL.spread(2).prompts == SMALL.prompts[::2] and SMALL.spread(None) is SMALL


@pytest.mark.parametrize("content", ['{"turns": []}', '{"other": 1}', "{not json", "", b"\xff\xfe"])
def test_a_bad_file_is_one_sentence(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FlashSpecError, match=r"bad\.jsonl"):
        load_prompts(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FlashSpecError, match="nowhere"):
        load_prompts(tmp_path / "nowhere.jsonl")
