"""Where the adapter attends through our kernel: the model's own logits, by its own masks."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from test_models_hf import CONFIGS, build, own_logits, score, texts
from torch import Tensor
from transformers import masking_utils

from flashspec.kernels import TRITON_AVAILABLE, decoding
from flashspec.models import hf
from flashspec.models.hf import HFModel

SEEN = {  # what the kernel is told of each layer: None sees all
    "gpt2": (None,) * 3,
    "gpt_neox": (None,) * 3,
    "gemma2": (5, None, 5),
    "mistral": (5,) * 3,
    "gpt_oss": (5, None, 5),
}


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """As on a GPU, but interpreted; holds the window of every call."""
    if not TRITON_AVAILABLE or torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    from flashspec.kernels import attention

    calls, attend = [], attention.attend

    def noted(*arguments) -> Tensor:
        calls.append(arguments[7])
        return attend(*arguments)

    monkeypatch.setattr(attention, "attend", noted)
    monkeypatch.setattr(hf, "MOST_QUERIES", 2)  # the interpreter is slow
    monkeypatch.setattr(decoding, "available", lambda device: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return calls


def wide(name: str) -> tf.PreTrainedConfig:
    config = CONFIGS[name]()
    config.update({"hidden_size": 64, "head_dim": 16})  # what the kernel takes
    return config


@pytest.mark.parametrize("name", SEEN)
def test_few_tokens_attend_through_our_kernel(name: str, kernel: list[int | None]) -> None:
    model = build(wide(name))
    lm = HFModel(model)
    assert kernel == [*SEEN[name]] * 2  # the trial run
    token_ids, kv = texts(2), lm.new_cache(2, 20)
    expected = own_logits(model, token_ids)
    kv.keys.fill_(7.0)  # what an unwritten slot holds must not show
    kv.values.fill_(7.0)
    kernel.clear()
    score(lm, token_ids[:, :9], [0, 0], kv)
    assert not kernel  # these are many
    score(lm, texts(2, 2, seed=1), [9, 7], kv)  # drafts that are written over
    logits = score(lm, torch.stack([token_ids[0, 9:11], token_ids[1, 7:9]]), [9, 7], kv)
    torch.testing.assert_close(logits[0], expected[0, 9:11], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[1], expected[1, 7:9], atol=1e-4, rtol=0)
    assert kernel == [*SEEN[name]] * 2


@pytest.mark.parametrize("name", SEEN)
def test_a_rule_that_layers_share_is_asked_once(
    name: str, kernel: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, slots_seen = [], hf._slots_seen

    def noted(rule, longest: int, device: torch.device) -> int:
        asked.append(rule)
        return slots_seen(rule, longest, device)

    monkeypatch.setattr(hf, "_slots_seen", noted)
    HFModel(build(wide(name)))
    assert len(asked) == len(set(SEEN[name]))


def test_a_kernel_that_fails_its_trial_is_left_out(kernel: list[int | None], monkeypatch: pytest.MonkeyPatch) -> None:
    constexpr = pytest.importorskip("triton.language").constexpr
    monkeypatch.setattr("flashspec.kernels.attention.LOG2E", constexpr(9.0))
    model = build(wide("gpt2"))
    with pytest.warns(UserWarning, match="attends through PyTorch, which is slower: our kernel failed its trial run"):
        lm = HFModel(model)
    kernel.clear()
    logits = score(lm, texts(1, 2), [0], lm.new_cache(1, 4))
    torch.testing.assert_close(logits, own_logits(model, texts(1, 2)), atol=1e-4, rtol=0)
    assert not kernel


RULES = {
    "causal": (masking_utils.causal_mask_function, 5000),
    "sliding": (masking_utils.sliding_window_causal_mask_function(700), 700),
    "only itself": (masking_utils.sliding_window_causal_mask_function(1), 1),
    "wider than any text": (masking_utils.sliding_window_causal_mask_function(9000), 5000),
    "chunked": (masking_utils.chunked_causal_mask_function(700, torch.zeros(1, dtype=torch.long)), 0),
    "both sides": (masking_utils.sliding_window_bidirectional_mask_function(700), 0),
    "all": (lambda row, head, position, slot: slot >= 0 * position, 0),
    "sinks": (lambda row, head, position, slot: (slot <= position) & ((slot > position - 700) | (slot < 4)), 0),
}


@pytest.mark.parametrize("rule", RULES)
def test_how_many_slots_a_rule_lets_see(rule: str) -> None:
    given, count = RULES[rule]
    assert hf._slots_seen(given, 5000, torch.device("cpu")) == count


@pytest.mark.parametrize("case", ["chunks", "narrow heads"])
def test_what_the_kernel_cannot_express_goes_through_pytorch(
    case: str, kernel: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "chunks":
        chunks = masking_utils.chunked_causal_mask_function(5, torch.zeros(9, dtype=torch.long))
        monkeypatch.setattr(masking_utils, "sliding_window_causal_mask_function", lambda _: chunks)
    lm = HFModel(build(wide("mistral") if case == "chunks" else CONFIGS["mistral"]()))
    score(lm, texts(1, 2), [0], lm.new_cache(1, 4))
    assert not kernel
