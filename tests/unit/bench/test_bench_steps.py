"""The parts of a step, measured on a CPU with tiny models; the GPU's timer only differs in capturing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_heads import LAYERS, PART, VOCAB, write_eagle, write_tiny
from small_models import llama

from flashspec.bench import parts, steps, timing
from flashspec.bench.baselines import StaticForward, llama_twin
from flashspec.bench.parts import Bench
from flashspec.bench.report import markdown, table
from flashspec.bench.shapes import DRAFTER_SHAPES, SHAPES, Shape, random_decoder, shape_config
from flashspec.bench.steps import Plan
from flashspec.core import Arm, FlashSpecError
from flashspec.drafters.early_exit import EarlyExitDrafter
from flashspec.drafters.model import ModelDrafter
from flashspec.models.decoder import Decoder
from flashspec.models.loading import LoadedModel

TINY = Shape("tiny", 64, 96, 4, 2, 16, 3, 50)
CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setitem(DRAFTER_SHAPES, "tiny", TINY)
    monkeypatch.setitem(steps.COPY_ELEMENTS, "cpu", 2**10)


def test_a_run_has_every_part(small: None, tmp_path: Path) -> None:
    output = tmp_path / "steps.json"
    plan = Plan([1, 5], [1, 2], ["plain", "ngram:4", "early-exit:2"], ["tiny"], ["transformers-eager"], [2])
    result = steps.run(
        shape="tiny", random=True, context=64, new_tokens=8, replays=2, calls=2, device="cpu", output=output, plan=plan
    )
    rows = result["rows"]
    assert result["settings"]["target"] == "tiny-shaped (random weights)" and not result["settings"]["left_out"]
    for batch_size in (1, 2):
        here = [row for row in rows if row["batch_size"] == batch_size]
        widths = [row["width"] for row in here if row["part"] == "forward" and row["method"] == "flashspec"]
        assert widths == [1, 3, 5]
        arms = [row["arm"] for row in here if row["part"] == "step"]
        assert arms == ["plain", "ngram:4", "early-exit:2", "tiny:4"]
        assert [row["arm"] for row in here if row["part"] == "drafter"] == ["tiny"]
        assert [row["width"] for row in here if row["method"] == "transformers-eager"] == [2]
    for row in rows:
        assert row["microseconds"] > 0
        if row["part"] == "step":  # forwards are timed inside the step
            assert 0 < row["rest_microseconds"] < row["microseconds"]
            assert row["forward_microseconds"] > 0
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    assert output.with_suffix(".png").exists() and output.with_suffix(".csv").exists()
    assert table(result).row_count == len(rows) == len(markdown(result).splitlines()) - 4


def test_what_heads_take_to_draft(small: None, tmp_path: Path) -> None:
    model = llama(VOCAB, num_hidden_layers=LAYERS, max_position_embeddings=128)
    model.save_pretrained(tmp_path / "target")
    folders = [str(write_eagle(tmp_path / "eagle")), str(write_tiny(tmp_path / "small", PART))]
    plan = Plan([1], [1], ["eagle3:3", "small:2", "ngram:2"])
    result = steps.run(
        str(tmp_path / "target"),
        context=64,
        new_tokens=8,
        replays=2,
        calls=2,
        device="cpu",
        plan=plan,
        drafters=folders,
    )
    parts = [(row["part"], row.get("arm"), row["width"]) for row in result["rows"] if row["part"] != "forward"]
    assert parts == [
        ("draft", "eagle3:3", 3),
        ("step", "eagle3:3", 4),
        ("drafter", "small", 1),
        ("draft", "small:2", 2),
        ("step", "small:2", 3),
        ("step", "ngram:2", 3),
    ]
    assert all(row["microseconds"] > 0 for row in result["rows"])


def fixed_timer(microseconds: float) -> timing.Timer:
    def time(call, before=None, /):  # type: ignore[no-untyped-def]
        call(0)
        return microseconds, 0.5

    return time


def test_mbu_is_bytes_over_time_over_bandwidth() -> None:
    model = random_decoder(shape_config(TINY), torch.float32, CPU)
    bench = Bench(
        LoadedModel(model, None, (), "tiny"), "cpu", fixed_timer(10.0), fixed_timer(40.0), 1, 1e12, 32, 4, 0.0
    )
    row = bench.forward(1, 1)
    attention, mlp, norms = 64 * 128 + 64 * 64, 3 * 64 * 96, 2 * 64
    size = 3 * (attention + mlp + norms) + (50 + 2) * 64  # LM head, an embedding row and the last norm
    assert row["bytes"] == 4 * size
    assert row["mbu"] == round(4 * size / 10e-6 / 1e12, 3)
    bench.timer = fixed_timer(12.0)
    assert bench.forward(1, 5)["over_plain"] == 1.2
    bench.timer = fixed_timer(3.0)
    assert bench.forward(1, 1, ModelDrafter(model, "small"))["over_plain"] == 0.3
    assert bench.forward(1, 1)["over_plain"] == 1.0
    bench.timer = fixed_timer(12.0)
    eager, graph = (bench.baseline(f"transformers-{kind}", llama_twin(model), 1, 5) for kind in ("eager", "graph"))
    assert (eager["microseconds"], graph["microseconds"]) == (40.0, 12.0)


def test_a_step_s_forwards_are_timed_one_behind_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft model reads two tokens first; an early exit's layers are forwards too."""
    model, small = (random_decoder(shape_config(TINY), torch.float32, CPU) for _ in range(2))
    forward, seen = Decoder.forward, list[tuple[Any, ...]]()

    def noted(self: Decoder, ids: Any, positions: Any, cache: Any, bound: int, num_layers: int | None = None) -> Any:
        seen.append((self, ids.shape[1], num_layers))
        return forward(self, ids, positions, cache, bound, num_layers)

    def timer(call: Any, before: Any = None) -> tuple[float, float]:
        call(0)
        return 10.0, 0.0

    monkeypatch.setattr(Decoder, "forward", noted)
    bench = Bench(LoadedModel(model, None, (), "tiny"), "cpu", timer, timer, 1, 1e12, 32, 4, 0.0)
    assert bench._forwards(Arm("ngram", 4), None, 1) is None
    bench.forwards = {(1, 5): 100.0}
    assert bench._forwards(Arm("ngram", 4), None, 1) == 100.0
    assert not seen
    assert bench._forwards(Arm("small", 4), ModelDrafter(small, "small"), 1) == 10.0
    assert seen == [(small, 2, None), *[(small, 1, None)] * 3, (model, 5, None)]
    seen.clear()
    assert bench._forwards(Arm("early-exit", 4), None, 1) == 10.0
    assert seen == [(model, 1, EarlyExitDrafter.create(model).num_layers)] * 4 + [(model, 5, None)]


def test_a_twin_computes_the_same_without_memory_of_its_own() -> None:
    model = random_decoder(shape_config(TINY), torch.float32, CPU)
    twin = llama_twin(model)
    ids = torch.arange(18).view(2, 9) % 50
    hidden = model.forward(ids, torch.arange(9).expand(2, -1), model.new_cache(2, 9), 9)
    torch.testing.assert_close(twin(ids).logits, model.logits(hidden), atol=1e-5, rtol=0)
    assert twin.lm_head.weight.data_ptr() == model.weights.lm_head.data_ptr()
    halves = twin.model.layers[1].mlp.up_proj.weight, model.weights.layers[1].gate_up[96:]
    assert halves[0].data_ptr() == halves[1].data_ptr()


def test_a_static_forward_can_be_repeated_for_ever() -> None:
    twin = llama_twin(random_decoder(shape_config(TINY), torch.float32, CPU))
    forward = StaticForward.make(twin, 2, 5, 32, 4, compiled=False)
    for _ in range(3):
        forward.rewind()
        lengths = [int(layer.cumulative_length) for layer in forward.cache.layers]
        assert lengths == [12] * 3
        for index in range(4):
            assert forward(index).shape == (2, 5, 50)
    with pytest.raises(FlashSpecError, match="context is 20; 4 calls of 5 tokens do not fit"):
        StaticForward.make(twin, 2, 5, 20, 4, compiled=False)


def test_a_baseline_that_cannot_be_had_is_said_to_be_missing(small: None) -> None:
    plan = Plan([1], [1], [], baselines=["transformers-eager"], baseline_widths=[40])
    result = steps.run(shape="tiny", random=True, context=64, replays=1, calls=2, device="cpu", plan=plan)
    assert result["settings"]["left_out"] == ["transformers-eager: context is 64; 2 calls of 40 tokens do not fit"]
    assert "left out: transformers-eager" in str(table(result).caption)
    assert [row["width"] for row in result["rows"]] == [1]


def test_other_targets_have_no_bytes_and_no_twin(small: None) -> None:
    from fakes import MarkovModel

    target = LoadedModel(MarkovModel.random(8, 3), None, (), "markov")
    plan = Plan([1], [1], ["plain"], baselines=["transformers-graph"])
    result = steps.run(target, context=32, new_tokens=4, replays=1, calls=1, device="cpu", plan=plan)
    assert [row["part"] for row in result["rows"]] == ["forward", "step"]
    assert result["rows"][0]["mbu"] is None
    assert result["settings"]["left_out"] == [
        "transformers-graph: a MarkovModel has no twin in transformers: only the fast decoder does"
    ]


def test_unknown_parts_of_a_plan_are_named() -> None:
    with pytest.raises(FlashSpecError, match="drafter size '7b' is unknown; there are 30m"):
        Plan(drafter_sizes=["7b"])
    with pytest.raises(FlashSpecError, match="baseline 'vllm' is unknown"):
        Plan(baselines=["vllm"])
    with pytest.raises(ValueError, match="arm 'ngram' should read"):
        Plan(arms=["ngram"])


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"plan": Plan([200], arms=[])}, FlashSpecError, "200 tokens do not fit into a context of 128"),
        ({"plan": Plan([1], arms=["ngram:128"])}, FlashSpecError, "129 tokens do not fit into a context of 128"),
        ({"plan": Plan([1], arms=["nosuch:2"])}, FlashSpecError, "drafter 'nosuch' is unknown"),
        ({"plan": Plan([1], arms=[]), "context": 1 << 20}, FlashSpecError, "tiny takes 8192 tokens, not a context of"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_said_before_anything_is(
    options: dict[str, Any], error: type[Exception], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "Bench", lambda *_: pytest.fail("it was measured"))
    loaded = LoadedModel(random_decoder(shape_config(TINY), torch.float32, CPU), None, (), "tiny")
    with pytest.raises(error, match=sentence):
        steps.run(loaded, device="cpu", **{"context": 128, **options})


def test_the_clock_takes_medians_and_what_comes_before_is_untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 0.0, 2e-6, 0.0, 9e-6, 0.0, 4e-6, 0.0, 6e-6, 0.0, 6e-6, 0.0, 8e-6])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    calls: list[int] = []
    rewinds: list[int] = []
    taken = timing.make_timer("cpu", 3, 2)(calls.append, lambda: rewinds.append(len(calls)))
    assert taken == (3.0, 1.0)  # of 6, 6, 8 over two calls; the first round had 2, 9, 4
    assert calls == [0, 1] * 7 and rewinds == list(range(0, 14, 2))


def test_the_clock_of_a_model_counts_steps_and_no_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_decoder(shape_config(TINY), torch.float32, CPU)
    clocked, ticks = parts.Clocked(model), iter(range(100))
    monkeypatch.setattr(parts.time, "perf_counter", lambda: float(next(ticks)))
    cache = clocked.new_cache(1, 128)
    for width in (100, 5):
        positions = torch.arange(width)[None]
        hidden = clocked.forward(torch.zeros(1, width, dtype=torch.int64), positions, cache, 128)
    assert clocked.seconds == 0.0
    assert torch.equal(clocked.logits(hidden), model.logits(hidden))
    assert clocked.seconds == 2.0
