"""How long a GPU takes from a process's start to its first token, and what memory beyond weights and caches.

python benchmarks/measure_gpu_start.py MODEL SHAPE OUTPUT: the model is widened to the shape. With lookups, and with the
head of the package: first with empty caches of compiled kernels and measured tilings, then with full ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOKENS = 128
DRAFTERS = ("suffix,ngram", "suffix,eagle3")


def child(model: str, shape: str, drafters: list[str], began: float) -> dict[str, float]:
    import torch

    from flashspec import SpeculativeEngine
    from flashspec.bench.widen import widened_model

    loaded, heads = widened_model(model, shape, "cuda", "bfloat16", drafters)
    torch.cuda.synchronize()
    row = {"target_seconds": time.time() - began}
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    engine = SpeculativeEngine.from_pretrained(loaded, [heads.get(name, name) for name in drafters], device="cuda")
    stream = iter(engine.stream([{"role": "user", "content": "Why is the sky blue?"}], TOKENS, temperature=0.0))
    next(stream)
    row["first_token_seconds"] = time.time() - began
    for _ in stream:
        pass
    row["answer_seconds"] = time.time() - began
    taken = free - torch.cuda.mem_get_info()[0]
    assert engine.workspaces is not None
    caches = sum(
        tensor.nbytes
        for workspace in engine.workspaces._kept.values()
        for reader in workspace.state.readers
        for tensor in (reader.cache.keys, reader.cache.values)
    )
    return row | {"caches_gb": caches / 1e9, "memory_beyond_gb": (taken - caches) / 1e9}


def main(model: str, shape: str, output: str) -> None:
    from flashspec.bench.provenance import provenance

    rows = []
    for drafters in DRAFTERS:
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "FLASHSPEC_CACHE": f"{folder}/ours", "TRITON_CACHE_DIR": f"{folder}/triton"}
            for caches in ("cold", "warm"):
                command = [sys.executable, __file__, model, shape, "--child", drafters, str(time.time())]
                printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
                figures = {name: round(value, 3) for name, value in json.loads(printed.splitlines()[-1]).items()}
                rows.append({"drafters": drafters, "caches": caches, **figures})
                print(rows[-1], flush=True)
    result = {
        "kind": "start",
        "provenance": provenance("cuda"),
        "settings": {"shape": shape, "new_tokens": TOKENS},
        "rows": rows,
    }
    Path(output).write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    if sys.argv[3] == "--child":
        print(json.dumps(child(sys.argv[1], sys.argv[2], sys.argv[4].split(","), float(sys.argv[5]))))
    else:
        main(*sys.argv[1:])
