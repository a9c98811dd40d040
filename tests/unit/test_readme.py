"""Every number in the README is read from a result file in the repository."""

from __future__ import annotations

import json
import re
from pathlib import Path

from flashspec.bench.report import markdown

ROOT = Path(__file__).parents[2]


def test_measured_tables_are_those_of_the_result_files() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(r"<!-- measured: (\S+) -->\n(.*?)<!-- /measured -->", readme, re.DOTALL)
    assert blocks
    for path, content in blocks:
        assert content.strip() == markdown(json.loads((ROOT / path).read_text("utf-8")))
