"""Draw docs/demo.svg: run the demo in a terminal of its own and keep what stands on the screen at the end."""

from __future__ import annotations

import io
import os
import pty
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

PROMPT = "Write a Python function that checks whether a word is a palindrome, then explain it."
COMMAND = ["flashspec", "generate", "--compare", "--max-new-tokens", "160", PROMPT]
WIDTH = 100

heard = bytearray()


def read(descriptor: int) -> bytes:
    piece = os.read(descriptor, 4096)
    heard.extend(piece)
    return piece


os.environ.update(COLUMNS=str(WIDTH), LINES="60", TERM="xterm-256color")
pty.spawn(COMMAND, read)
console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
console.print(Text.from_ansi(f'$ flashspec generate --compare "{PROMPT}"'))
gone = re.compile(r"\x1b\[\?25[lh]|[^\n]*\x1b\[2K")  # what progress bars drew and wiped away
console.print(Text.from_ansi(gone.sub("", heard.decode("utf-8").replace("\r\n", "\n"))))
console.save_svg(str(Path(__file__).with_name("demo.svg")), title="flashspec")
