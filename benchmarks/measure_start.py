"""How long a command takes: `flashspec --help`, and a first token when the model is already in the cache."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from flashspec.bench.provenance import provenance

TAKES = 5
COMMANDS = {
    "help": ["--help"],
    "first token": ["generate", "--max-new-tokens", "1", "--temperature", "0", "Say hello."],
}


def seconds(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([Path(sys.executable).with_name("flashspec"), *arguments], check=True, capture_output=True)
    return time.perf_counter() - started


result = {"kind": "start", "provenance": provenance("cpu"), "settings": {"takes": TAKES}, "rows": []}
for name, arguments in COMMANDS.items():
    seconds(arguments)  # files into memory
    times = [seconds(arguments) for _ in range(TAKES)]
    row = {"command": name, "seconds": round(median(times), 3), "slowest": round(max(times), 3)}
    result["rows"].append(row)
    print(row)
Path(sys.argv[1]).write_text(json.dumps(result, indent=2) + "\n", "utf-8")
