"""Heads as they are trained against the same arithmetic done token by token; features against the decoder's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_models import llama
from torch import Tensor

from flashspec.drafters.heads import eagle_layers
from flashspec.models.checkpoint import StateDict, decoder_config, decoder_weights
from flashspec.models.decoder import Decoder
from flashspec.training.batches import Batch, Lesson
from flashspec.training.features import Reading, default_feature_layers, feature_scales, hidden_states
from flashspec.training.heads import DraftHead, Eagle3Head, HeadShape, MedusaHeads, TinyModel, following
from flashspec.training.measure import Teacher, accepted_lengths, draft_loss, summarise, walk
from flashspec.training.vocabulary import DraftVocabulary

LENGTH, STEPS = 16, 4


def decoder(**changes: object) -> Decoder:
    model = llama(num_hidden_layers=4, **changes)
    config = decoder_config(model.config.to_dict())
    return Decoder(config, decoder_weights(config, StateDict(model.state_dict()), torch.device("cpu"), torch.float32))


MODEL = decoder()
TEXTS = torch.randint(320, (2, LENGTH), generator=torch.Generator().manual_seed(1))
READING = hidden_states(MODEL, TEXTS, [0, 1, 2])


def head_of(kind: type[DraftHead], rows: Tensor | None = None, vocab: int = 40) -> DraftHead:
    shape = HeadShape(replace(MODEL.config, windows=(None,) * 2), vocab, 3, STEPS)
    torch.manual_seed(0)
    more = {Eagle3Head: [[1.0, 2.0, 4.0]], MedusaHeads: [None if rows is None else [1.0, 2.0, 4.0, 3.0, 0.5]]}
    head = kind(shape, rows, *more.get(kind, []))
    with torch.no_grad():
        for parameter in head.parameters():  # large enough for a mistake to show
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head


def cached(token_ids: Tensor) -> Tensor:
    """Final-normed hidden states, by the decoder's own forward."""
    positions = torch.arange(token_ids.shape[1]).expand_as(token_ids)
    return MODEL.forward(token_ids, positions, MODEL.new_cache(len(token_ids), LENGTH), LENGTH)


def test_features_are_what_the_decoder_computes() -> None:
    torch.testing.assert_close(READING.final, cached(TEXTS), rtol=1e-4, atol=1e-5)
    for place, layer in enumerate([0, 1, 2]):
        stream = READING.fused.chunk(3, -1)[place]
        early = MODEL.forward(TEXTS, torch.arange(LENGTH).expand(2, -1), MODEL.new_cache(2, LENGTH), LENGTH, layer + 1)
        normed = F.rms_norm(stream, (64,), MODEL.weights.final_norm, MODEL.config.norm_eps)
        torch.testing.assert_close(normed, early, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(READING.embedding, MODEL.weights.embedding[TEXTS])


def test_features_see_through_a_sliding_window() -> None:
    model = Decoder(replace(MODEL.config, windows=(None, 3, 3, None)), MODEL.weights)
    positions = torch.arange(LENGTH).expand(2, -1)
    expected = model.forward(TEXTS, positions, model.new_cache(2, LENGTH), LENGTH)
    torch.testing.assert_close(hidden_states(model, TEXTS, [0, 1, 2]).final, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, READING.final, atol=1e-3)


def test_default_features_exist_in_small_targets() -> None:
    assert default_feature_layers(30) == [1, 14, 26]
    for count in range(1, 9):
        layers = default_feature_layers(count)
        assert layers == sorted(set(layers)) and len(layers) == min(count, 3)
        assert all(-1 <= layer < count - 1 for layer in layers)
    for count in range(7, 100):  # a head that names none is read so
        assert default_feature_layers(count) == [entered - 1 for entered in eagle_layers(count)]


def test_layer_minus_one_is_the_embedding() -> None:
    reading = hidden_states(MODEL, TEXTS, [-1, 0])
    assert torch.equal(reading.fused, torch.cat([reading.embedding, hidden_states(MODEL, TEXTS, [0]).fused], -1))


def test_scales_are_those_of_most_tokens() -> None:
    parts = [torch.full((2, 5, 4), float(size)) for size in (1, 2, 3)]
    parts[2][0, 0] = 1000.0
    fused = torch.cat(parts, -1)
    fused[1, 2:] = 500.0  # padding
    lengths = torch.tensor([fused.shape[1], 2])
    assert feature_scales(Reading(parts[1], fused, parts[0]), lengths) == [1.0, 2.0, 3.0, 1.0, 2.0]


def draft_by_hand(head: Eagle3Head, anchor: int, row: int) -> list[Tensor]:
    """One draft with a cache of keys and values: first the true pairs up to the anchor, then one token at a time on
    what the head made of the one before."""
    c, layer = head.midlayer.config, head.midlayer
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def rotated(heads: Tensor, position: int) -> Tensor:
        angles = position * torch.tensor(c.inv_freq)
        first, second = heads.chunk(2, -1)
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1
        )

    def read(token: int, feature: Tensor, position: int) -> Tensor:
        embedded = layer.input_layernorm(MODEL.weights.embedding[token])
        both = torch.cat([embedded, layer.hidden_norm(feature)])
        q, k, v = (getattr(layer.self_attn, f"{x}_proj")(both).view(-1, c.head_dim) for x in "qkv")
        keys.append(rotated(k, position))
        values.append(v)
        mixed = []
        for index, query in enumerate(rotated(q, position)):
            group = index // c.group_size
            scores = torch.stack([query @ key[group] for key in keys]) / c.head_dim**0.5
            mixed.append(sum(w * value[group] for w, value in zip(scores.softmax(0), values, strict=True)))
        hidden = feature + layer.self_attn.o_proj(torch.cat(mixed))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    text, fused = TEXTS[row], READING.fused[row]
    for position in range(anchor + 1):
        hidden = read(int(text[position + 1]), F.linear(fused[position], head.public_state()["fc.weight"]), position)
    outputs = [head.norm(hidden)]
    for step in range(1, STEPS):
        hidden = read(int(text[anchor + 1 + step]), hidden, anchor + step)
        outputs.append(head.norm(hidden))
    return outputs


@torch.no_grad()
def test_training_unrolls_what_drafting_does_with_a_cache() -> None:
    head = head_of(Eagle3Head)
    assert isinstance(head, Eagle3Head)
    unrolled = head.unroll(READING, STEPS)
    for row, anchor in ((0, 0), (1, 5), (0, LENGTH - 1 - STEPS)):
        for step, expected in enumerate(draft_by_hand(head, anchor, row)):
            torch.testing.assert_close(unrolled[step][row, anchor], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_medusa_and_tiny_by_hand() -> None:
    medusa = head_of(MedusaHeads)
    hidden = READING.final[1, 3]
    expected = hidden
    for block in range(2):
        weights = medusa.state_dict()
        linear = F.linear(expected, weights[f"2.{block}.linear.weight"], weights[f"2.{block}.linear.bias"])
        expected = expected + F.silu(linear)
    torch.testing.assert_close(medusa.unroll(READING, 4)[2][1, 3], expected)
    torch.testing.assert_close(medusa.score(2, expected), expected @ medusa.state_dict()["2.2.weight"].T)

    ours = head_of(MedusaHeads, MODEL.weights.lm_head[:40])
    embedded = MODEL.weights.embedding[TEXTS[1, 4]]
    expected = hidden + ours.public_state()["fc.weight"] @ torch.cat([READING.fused[1, 3], hidden, embedded])
    for block in list(ours.head(2)):
        expected = block(expected)
    torch.testing.assert_close(ours.unroll(READING, 4)[2][1, 3], expected, rtol=1e-4, atol=1e-5)

    tiny = head_of(TinyModel, MODEL.weights.lm_head[:40])
    stored = {
        **tiny.state_dict(),
        "model.embed_tokens.weight": MODEL.weights.embedding,
        "lm_head.weight": torch.zeros(320, 64),
    }
    config = replace(MODEL.config, windows=(None,) * 2)
    model = Decoder(config, decoder_weights(config, StateDict(stored), torch.device("cpu"), torch.float32))
    whole = model.forward(TEXTS, torch.arange(LENGTH).expand(2, -1), model.new_cache(2, LENGTH), LENGTH)
    for step, drafted in enumerate(tiny.unroll(READING, 3)):
        torch.testing.assert_close(drafted[:, : LENGTH - 1 - step], whole[:, 1 + step :], rtol=1e-4, atol=1e-5)


def test_parameter_names_are_the_public_ones() -> None:
    attention = [f"midlayer.self_attn.{x}_proj.weight" for x in "kqvo"]
    norms = [f"midlayer.{x}.weight" for x in ("hidden_norm", "input_layernorm", "post_attention_layernorm")]
    mlp = [f"midlayer.mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
    eagle = head_of(Eagle3Head)
    assert set(eagle.public_state()) == {*attention, *norms, *mlp, "fc.weight", "norm.weight", "lm_head.weight"}
    assert eagle.state_dict()["midlayer.self_attn.q_proj.weight"].shape == (64, 128)
    blocks = [f"{i}.{b}.linear.{x}" for i in range(STEPS) for b in range(2) for x in ("weight", "bias")]
    assert set(head_of(MedusaHeads).state_dict()) == {*blocks, *(f"{i}.2.weight" for i in range(STEPS))}
    rows = torch.zeros(40, 64)
    assert "lm_head.weight" not in head_of(Eagle3Head, rows).public_state()
    assert set(head_of(MedusaHeads, rows).public_state()) == {*blocks, "fc.weight"}
    assert "model.layers.1.self_attn.q_proj.weight" in head_of(TinyModel, rows).state_dict()


def test_following_moves_later_entries_up() -> None:
    assert following(torch.tensor([[1, 2, 3]]), 2).tolist() == [[3, 0, 0]]


class Fixed(DraftHead):
    """Says the same scores at every draft step: by anchor, (B, T, V')."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def unroll(self, reading: object, steps: int) -> list[Tensor]:
        return [self.scores] * steps

    def lm_rows(self, step: int) -> Tensor:
        return torch.eye(self.scores.shape[-1])


def test_accepted_lengths_and_the_walk_along_a_text() -> None:
    text = torch.tensor([[7, 7, 5, 5, 5, 6, 5, 5, 0, 0]])
    batch = Batch(text, torch.tensor([2]), torch.tensor([8]))
    always_five = F.one_hot(torch.full((1, 10), 1), 3).float()
    vocabulary = DraftVocabulary(torch.tensor([2, 5, 6]), 8)
    accepted = accepted_lengths(Fixed(always_five), READING, batch, vocabulary, 3)[0].tolist()
    assert accepted[:6] == [3, 2, 1, 0, 2, 1]
    assert walk(accepted, 2, 8, 3) == [3]  # the next step would have less than three tokens ahead
    assert walk(accepted, 2, 8, 1) == [3, 2]
    assert walk([0, 1, 0, 0, 0, 0, 0], 3, 8, 2) == [1, 0, 0]
    assert summarise([2, 0, 1, 0], 2) == ((0.5, 0.5), 1.75)
    assert summarise([], 2) == ((0.0, 0.0), 1.0)


def test_the_loss_is_the_cross_entropy_to_the_target() -> None:
    vocabulary = DraftVocabulary(torch.arange(0, 320, 4), 320)
    teacher = Teacher(vocabulary, MODEL.weights.lm_head[vocabulary.ids])
    text = TEXTS.clone()
    text[:, 5:9] = torch.tensor([4, 8, 3, 12])  # 3 cannot be drafted
    reading = hidden_states(MODEL, text, [0, 1, 2])
    batch = Batch(text, torch.tensor([5, 6]), torch.tensor([9, 9]))
    scores = torch.randn(2, LENGTH, 80, generator=torch.Generator().manual_seed(2))
    aim = (reading.final @ teacher.rows.T).softmax(-1)
    expected = 0.0
    for step in range(2):
        terms = []
        for row, start in ((0, 5), (1, 6)):
            for position in range(start, 9):
                anchor = position - 2 - step
                if int(text[row, position]) % 4 == 0:
                    terms.append(-(aim[row, position - 1] * scores[row, anchor].log_softmax(-1)).sum())
        assert len(terms) == 5
        expected += 0.5**step * torch.stack(terms).mean() / 1.5
    loss = draft_loss(Fixed(scores), reading, Lesson.of(batch, teacher.vocabulary.t2d, 2), teacher, 0.5)
    torch.testing.assert_close(loss, expected)
    padded = Lesson.of(batch, teacher.vocabulary.t2d, 2, multiple=7)
    torch.testing.assert_close(draft_loss(Fixed(scores), reading, padded, teacher, 0.5), expected)


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("kind", [Eagle3Head, MedusaHeads])
def test_what_lies_behind_a_row_changes_nothing(kind: type[DraftHead], shares: bool) -> None:
    vocabulary = DraftVocabulary(torch.arange(40), 320)
    teacher = Teacher(vocabulary, MODEL.weights.lm_head[:40])
    text = TEXTS % 40
    head = head_of(kind, teacher.rows if shares else None)
    losses = []
    for tail in (0, 9):
        text[0, 10:] = tail
        batch = Batch(text, torch.tensor([2, 2]), torch.tensor([10, 16]))
        reading = hidden_states(MODEL, text, [0, 1, 2])
        losses.append(draft_loss(head, reading, Lesson.of(batch, teacher.vocabulary.t2d, STEPS), teacher, 0.8).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
