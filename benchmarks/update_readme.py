"""Redraw the README's tables from the result files that they name."""

from __future__ import annotations

import json
import re
from pathlib import Path

from flashspec.bench.report import markdown

ROOT = Path(__file__).parents[1]


def redraw(found: re.Match[str]) -> str:
    table = markdown(json.loads((ROOT / found[1]).read_text("utf-8")))
    return f"<!-- measured: {found[1]} -->\n{table}\n<!-- /measured -->"


readme = ROOT / "README.md"
pattern = re.compile(r"<!-- measured: (\S+) -->\n.*?<!-- /measured -->", re.DOTALL)
readme.write_text(pattern.sub(redraw, readme.read_text("utf-8")), "utf-8")
