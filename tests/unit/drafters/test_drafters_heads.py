"""Drafter heads: what they draft equals a plain forward over the whole text, and the text stays the target's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import small_heads
import torch
import torch.nn.functional as F
from decoding import TakingTurns, decode, open_run
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from small_heads import PART, VOCAB, write_eagle, write_medusa, write_tiny
from small_models import llama
from torch import Tensor
from transformers import PreTrainedModel

from flashspec.config import SamplingConfig
from flashspec.core import Arm, Draft
from flashspec.drafters.base import Drafter
from flashspec.drafters.eagle import EagleDrafter, EagleProposer
from flashspec.drafters.heads import load_head
from flashspec.drafters.medusa import MedusaDrafter, MedusaProposer
from flashspec.drafters.model import ModelDrafter
from flashspec.drafters.ngram import NgramDrafter
from flashspec.engine.arms import check_arms, make_drafter
from flashspec.engine.prefix import PrefixCache
from flashspec.engine.state import DecodeState
from flashspec.kernels import native_build
from flashspec.kernels.native import PackedMatrix
from flashspec.models.checkpoint import StateDict, decoder_config, decoder_weights
from flashspec.models.decoder import Decoder
from flashspec.sampling.sampler import make_sampler

PROMPTS = [[3, 7, 1, 7, 20, 9, 4, 4], [5, 12], [31]]
ARMS = (
    "plain",
    "eagle:3",
    "medusa:2",
    "ngram:2",
    "eagle:7",
    "tiny:2",
    "whole:4",
    "plain",
    "medusa:4",
    "eagle:1",
    "beside:3",
)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def reference_model() -> PreTrainedModel:
    return llama(VOCAB, num_hidden_layers=small_heads.LAYERS, max_position_embeddings=96)


def target_of(model: PreTrainedModel) -> Decoder:
    config, state = decoder_config(model.config.to_dict()), StateDict(model.state_dict())
    return Decoder(config, decoder_weights(config, state, torch.device("cpu"), torch.float32))


MODEL = reference_model()
TARGET = target_of(MODEL)


def heads(folder: Path) -> dict[str, Drafter]:
    """One of each; `whole` scores every token, `beside` is Medusa that reads more than the final state."""
    folders = {
        "eagle": write_eagle(folder / "eagle"),
        "whole": write_eagle(folder / "whole", None, seed=8),
        "medusa": write_medusa(folder / "medusa"),
        "beside": write_medusa(folder / "beside", own=False, part=PART, beside=True),
        "tiny": write_tiny(folder / "tiny", PART),
    }
    return {name: load_head(path, TARGET, name) for name, path in folders.items()} | {"ngram": NgramDrafter()}


def plain_text(count: int | Sequence[int], **options: Any) -> list[list[int]]:
    return decode(TARGET, PROMPTS, ["plain"], {}, count, **options)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0}, {"temperature": 0.9, "variant": "coupled"}, {"temperature": 0, "logit_bias": {3: 4.0}}],
    ids=["greedy", "coupled", "biased"],
)
def test_the_text_is_the_targets(tmp_path: Path, settings: dict[str, Any], lag: int) -> None:
    """A ragged batch, arms in turn, a stop token, and one row that ends where the context does."""
    counts = [88, 40, 7]
    options: dict[str, Any] = {**settings, "stop_ids": [2], "seed": 3}
    expected = plain_text(counts, **options)
    found = decode(TARGET, PROMPTS, ARMS, heads(tmp_path), counts, lag=lag, **options)
    assert found == expected
    assert len(found[0]) > 20


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_drafts_longer_than_the_window_and_the_context(tmp_path: Path, temperature: float) -> None:
    options: dict[str, Any] = {"temperature": temperature, "variant": "coupled", "seed": 4}
    arms = ["eagle:40", "medusa:4", "whole:64"]
    assert decode(TARGET, PROMPTS, arms, heads(tmp_path), 60, **options) == plain_text(60, **options)


def eagle_logits(folder: Path, text: Sequence[int], drafted: Sequence[int]) -> Tensor:
    """(len(drafted) + 1, V') from scratch: every token beside the target's states at the token before it, drafted ones
    beside the head's own; attention over all of them. Its matrices are in q8_0 if the native kernel is there."""
    w = load_file(folder / "model.safetensors")
    if native_build.available():
        w |= {name: PackedMatrix.quantised(tensor).dequantise() for name, tensor in w.items() if tensor.dim() == 2}
    states = MODEL(torch.tensor([text]), output_hidden_states=True).hidden_states
    known = torch.cat([states[layer][0] for layer in (2, 3, 4)], -1)[: len(text) - 1] @ w["fc.weight"].T
    embedding, tokens = MODEL.get_input_embeddings().weight, [*text[1:], *drafted]
    heads, kv, size = small_heads.HEADS, small_heads.KV_HEADS, small_heads.HEAD_DIM
    angles = torch.arange(len(tokens))[:, None] / 10000.0 ** (torch.arange(0, size, 2) / size)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * w[f"{name}.weight"]

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat(
            [first * cos[: len(x)] - second * sin[: len(x)], second * cos[: len(x)] + first * sin[: len(x)]], -1
        )

    def layer(hidden: Tensor) -> Tensor:
        """All slots at once; what is drafted depends on the slot before, so this is called once a draft token."""
        count = len(hidden)
        both = torch.cat(
            [norm(embedding[tokens[:count]], "midlayer.input_layernorm"), norm(hidden, "midlayer.hidden_norm")], -1
        )
        q, k, v = (both @ w[f"midlayer.self_attn.{x}_proj.weight"].T for x in "qkv")
        q, k = turned(q.view(count, heads, size)), turned(k.view(count, kv, size))
        k, v = (x.repeat_interleave(heads // kv, 1) for x in (k, v.view(count, kv, size)))
        scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5
        scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), -torch.inf)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        hidden = hidden + mixed @ w["midlayer.self_attn.o_proj.weight"].T
        normed = norm(hidden, "midlayer.post_attention_layernorm")
        gate, up = (normed @ w[f"midlayer.mlp.{x}_proj.weight"].T for x in ("gate", "up"))
        return hidden + (F.silu(gate) * up) @ w["midlayer.mlp.down_proj.weight"].T

    fed, logits = known, []
    for _ in range(len(drafted) + 1):
        last = layer(fed)[-1:]
        lm_head = w.get("lm_head.weight", MODEL.get_output_embeddings().weight)
        logits.append((norm(last, "norm") @ lm_head.T)[0])
        fed = torch.cat([fed, last])
    return torch.stack(logits)


def medusa_logits(folder: Path, text: Sequence[int]) -> Tensor:
    """(4, V)"""
    w = load_file(folder / "medusa_lm_head.safetensors")
    states = [layer[0, len(text) - 2] for layer in MODEL(torch.tensor([text]), output_hidden_states=True).hidden_states]
    final, logits = states[-1], []
    if "fc.weight" in w:
        embedded = MODEL.get_input_embeddings().weight[text[-1]]
        final = final + w["fc.weight"] @ torch.cat([states[2], states[3], states[4], final, embedded])
    for head in range(4):
        hidden = final
        for block in range(2):
            hidden = hidden + F.silu(w[f"{head}.{block}.linear.weight"] @ hidden + w[f"{head}.{block}.linear.bias"])
        logits.append(w.get(f"{head}.2.weight", MODEL.get_output_embeddings().weight) @ hidden)
    return torch.stack(logits)


def draft_now(state: DecodeState, drafter: Drafter, proposer: Any = None, length: int = 3) -> Draft:
    state.prepare()
    proposer = proposer or drafter.start(state)
    proposer.prepare(state)
    return proposer.propose(state, length)


def assert_drafted_from(draft: Draft, row: int, expected: Tensor, part: Sequence[int] | None) -> None:
    assert draft.logits is not None
    found = draft.logits[row]
    if part is not None:
        outside = [token for token in range(VOCAB) if token not in part]
        assert (found[:, outside] == -torch.inf).all()
        assert set(draft.token_ids[row].tolist()) <= set(part)
        found = found[:, list(part)]
    torch.testing.assert_close(found, expected[: len(found)], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("part", [PART, None], ids=["trimmed", "whole"])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 9, 14])
def test_an_eagle_head_drafts_as_from_scratch(tmp_path: Path, steps: int, part: list[int] | None) -> None:
    """After steps by arms of several lengths, its own among them, some of which accept whole drafts."""
    folder = write_eagle(tmp_path / "eagle", part)
    head = load_head(folder, TARGET, "eagle")
    perfect = load_head(write_tiny(tmp_path / "tiny"), TARGET, "tiny")
    arms = ["eagle:2", "plain", "tiny:6", "eagle:6", "plain", "plain", "plain", "plain", "plain", "plain", "eagle:1"]
    drafters = {"eagle": head, "tiny": perfect}
    run = open_run(TARGET, PROMPTS, arms, drafters, 60, temperature=1.0, selector=TakingTurns(len(arms)))
    taken = iter(run)
    for _ in range(steps):
        next(taken)
    draft = draft_now(run.state, head, run.proposers.get("eagle"))
    for row, text in enumerate(run.state.texts):
        if len(text) > 1:
            assert draft.lengths[row] == 3
            assert_drafted_from(draft, row, eagle_logits(folder, text, draft.token_ids[row, :2].tolist()), part)
        else:
            assert draft.lengths[row] == 0  # there are no features yet


@pytest.mark.parametrize("native", [True, False])
def test_an_eagle_head_catches_up_after_long_accepted_drafts(
    tmp_path: Path, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target itself drafts 8 tokens, all of which are accepted: more than a head's window."""
    if not native:
        monkeypatch.setattr(native_build, "available", lambda: False)
    folder = write_eagle(tmp_path)
    head = load_head(folder, TARGET, "eagle")
    drafters = {"eagle": head, "self": ModelDrafter(TARGET)}
    run = open_run(TARGET, PROMPTS, ["eagle:2", "self:8"], drafters, 60, temperature=1.0)
    for number, output in enumerate(run):
        assert number % 2 == 0 or all(row.accepted == 8 for row in output.record.rows)
        draft = draft_now(run.state, head, run.proposers["eagle"])
        for row, text in enumerate(run.state.texts):
            expected = eagle_logits(folder, text, draft.token_ids[row, :2].tolist())
            assert_drafted_from(draft, row, expected, PART)
        if number == 4:
            break


def test_a_conversation_keeps_what_its_next_text_shares(tmp_path: Path) -> None:
    """The second text parts from the first one in the middle of what a head has read."""
    folder, memory = write_eagle(tmp_path), PrefixCache()
    head = load_head(folder, TARGET, "eagle")
    first, second = list(range(1, 30)), [*range(1, 20), *range(39, 29, -1)]
    for text in (first, second, [*second, 5]):
        sampler = make_sampler(SamplingConfig(temperature=1.0), [text], [], VOCAB, 1, TARGET.device)
        state = DecodeState.create([text], [len(text) + 9], [], TARGET, sampler, memory=memory)
        draft = draft_now(state, head)
        assert_drafted_from(draft, 0, eagle_logits(folder, text, draft.token_ids[0, :2].tolist()), PART)
        for reader in state.readers:
            reader.advance(1)
        memory.keep(text, state.readers)


@pytest.mark.parametrize("beside", [False, True], ids=["published", "ours"])
@pytest.mark.parametrize("own", [True, False], ids=["own lm heads", "the target's"])
def test_medusa_heads_draft_as_from_scratch(tmp_path: Path, own: bool, beside: bool) -> None:
    folder = write_medusa(tmp_path, own=own, beside=beside)
    drafter = load_head(folder, TARGET, "medusa")
    run = open_run(TARGET, PROMPTS, ["plain", "medusa:3"], {"medusa": drafter}, 40, temperature=1.0)
    for number, _ in enumerate(run):
        draft = draft_now(run.state, drafter, run.proposers.get("medusa"), length=9)
        assert draft.token_ids.shape == (3, 4)
        for row, text in enumerate(run.state.texts):
            assert_drafted_from(draft, row, medusa_logits(folder, text), None)
        if number == 6:
            break


def test_arms_of_medusa_draft_no_more_than_it_has_heads(tmp_path: Path) -> None:
    drafters = {"medusa": load_head(write_medusa(tmp_path), TARGET, "medusa")}
    assert check_arms([Arm("medusa", 8), Arm("medusa", 9)], drafters) == [Arm("medusa", 4)]


def test_a_tiny_model_shares_the_vocabulary(tmp_path: Path) -> None:
    drafter = load_head(write_tiny(tmp_path, PART), TARGET, "tiny")
    draft = draft_now(open_run(TARGET, PROMPTS, ["plain"], {}, 40, temperature=0).state, drafter)
    assert drafter.model.weights.embedding is TARGET.weights.embedding  # type: ignore[attr-defined]
    assert torch.equal(drafter.model.weights.lm_head, TARGET.weights.lm_head[PART])  # type: ignore[attr-defined]
    assert set(draft.token_ids.flatten().tolist()) <= set(PART) and draft.logits is None


@pytest.mark.parametrize("late", [False, True])
def test_features_asked_for_late_are_read_again(tmp_path: Path, late: bool) -> None:
    folder = write_eagle(tmp_path)
    head = load_head(folder, TARGET, "eagle")
    state = open_run(TARGET, PROMPTS[:1], ["plain"], {} if late else {"eagle": head}, 20, temperature=1.0).state
    state.prepare()
    assert (state.target.features is None) == late
    draft = draft_now(state, head)
    assert_drafted_from(draft, 0, eagle_logits(folder, PROMPTS[0], draft.token_ids[0, :2].tolist()), PART)


def test_a_head_that_knows_the_target_is_accepted_more(tmp_path: Path) -> None:
    """A target whose layers add nothing writes a fixed successor of each token; Medusa's identity blocks with LM heads
    that look up the successor's successor know it, random ones do not."""
    model = reference_model()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    target = target_of(model)
    successor = target.logits(
        target.forward(torch.arange(VOCAB)[:, None], torch.zeros(VOCAB, 1).long(), target.new_cache(VOCAB, 2), 2)
    )
    ahead = successor[:, 0].argmax(-1)  # (V,)
    final = model.model.norm(model.get_input_embeddings().weight)  # (V, hidden), the hidden state of each last token
    tensors, token = {}, ahead
    for head in range(3):
        token = ahead[token]
        tensors[f"{head}.0.linear.weight"] = torch.zeros(64, 64)
        tensors[f"{head}.0.linear.bias"] = torch.zeros(64)
        wanted = 20.0 * F.one_hot(token, VOCAB).float()
        tensors[f"{head}.1.weight"] = torch.linalg.lstsq(final, wanted).solution.T.contiguous()
    good = small_heads.write(tmp_path / "good", tensors, {"medusa_num_heads": 3, "medusa_num_layers": 1})
    accepted = {}
    for name, path in {"good": good, "random": write_medusa(tmp_path / "random")}.items():
        run = open_run(
            target, [[3, 4], [9]], ["plain", f"{name}:3"], {name: load_head(path, target, name)}, 40, temperature=0
        )
        accepted[name] = sum(output.record.accepted for output in run)
    assert accepted["good"] > 40 > 10 > accepted["random"]


@pytest.mark.parametrize(
    ("write", "kind", "proposes"),
    [(write_eagle, EagleDrafter, EagleProposer), (write_medusa, MedusaDrafter, MedusaProposer)],
)
def test_a_folder_is_named_like_any_drafter(tmp_path: Path, write: Any, kind: type, proposes: type) -> None:
    def load(source: Any) -> Any:
        raise AssertionError("not a model")

    drafter = make_drafter(str(write(tmp_path)), TARGET, load)
    assert isinstance(drafter, kind) and drafter.name == str(tmp_path)
    state = open_run(TARGET, PROMPTS, ["plain"], {}, 20).state
    assert isinstance(drafter.start(state), proposes)


def test_a_hubs_id_is_fetched_before_it_is_asked_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def snapshot(model_id: str, **_: Any) -> str:
        fetched.append(model_id)
        if not (tmp_path / model_id).is_dir():
            raise LocalEntryNotFoundError("offline")
        return str(tmp_path / model_id)

    def load(source: Any) -> Any:
        return TARGET, f"a model named {source}"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    write_eagle(tmp_path / "some" / "head")
    (tmp_path / "some" / "model").mkdir()
    drafter = make_drafter("some/head", TARGET, load)
    assert isinstance(drafter, EagleDrafter) and drafter.name == "some/head"
    for name in ("some/model", "some/where"):
        assert make_drafter(name, TARGET, load).name == f"a model named {name}"
    assert fetched == ["some/head", "some/model", "some/where"]
    make_drafter("smollm2", TARGET, load)  # not fetched here, where nobody sees how far it is
