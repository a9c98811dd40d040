"""`model.generate(custom_generate=speculative_generate(...))` writes what `model.generate()` writes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import transformers as tf
from small_models import llama, randomised
from torch import Tensor

from flashspec.core import FlashSpecError
from flashspec.engine import custom_generate as module
from flashspec.engine.custom_generate import speculative_generate
from flashspec.models.loading import load_model

PAD = 0
ARMS = ("plain", "suffix:8", "ngram:3", "early-exit:2")
DRAFTERS = ("suffix", "ngram", "early-exit")


def gpt2() -> tf.PreTrainedModel:
    config = tf.GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=3, n_head=2, eos_token_id=2)
    model = randomised(tf.GPT2LMHeadModel(config))
    for name, parameter in model.named_parameters():  # biases of 1 would drown the text, and one token repeat for ever
        if name.endswith("bias"):
            parameter.sub_(1)
        elif "wpe" in name:
            parameter.mul_(4)
    return model


def prompts(rows: int) -> dict[str, Tensor]:
    """Rows of 9, 6 and 3 tokens, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, 96, (rows, 9), generator=generator)
    mask = torch.ones_like(input_ids)
    for row in range(rows):
        input_ids[row, : 3 * row] = PAD
        mask[row, : 3 * row] = 0
    return {"input_ids": input_ids, "attention_mask": mask}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> tf.PreTrainedModel:
    return llama(96, num_hidden_layers=3) if request.param == "llama" else gpt2()


@pytest.fixture(scope="module")
def speculate() -> object:
    return speculative_generate(DRAFTERS, arms=ARMS)


def written_in_the_middle(model: tf.PreTrainedModel, inputs: dict[str, Tensor]) -> int:
    """A token that the last row first writes after a few others: with it as eos, rows end at different lengths."""
    free = model.generate(**inputs, do_sample=False, max_new_tokens=24, eos_token_id=None, pad_token_id=PAD)
    text = free[-1, inputs["input_ids"].shape[1] :].tolist()
    return next(token for at, token in enumerate(text) if at > 3 and token not in text[:at])


SETTINGS = [
    {},
    {"repetition_penalty": 1.3},
    {"min_new_tokens": 12},
    {"min_length": 16},
    {"logits_processor": tf.LogitsProcessorList([tf.TemperatureLogitsWarper(1.5)])},
]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("settings", SETTINGS)
def test_greedy_text_is_that_of_generate(model, speculate, rows, settings) -> None:
    inputs = prompts(rows)
    eos = written_in_the_middle(model, inputs)
    options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": [eos, 2], "pad_token_id": PAD, **settings}
    expected = model.generate(**inputs, **options)
    if "repetition_penalty" in settings and rows > 1 and not ignores_padding():
        with pytest.raises(ValueError, match="repetition_penalty counts padding"):
            model.generate(**inputs, **options, custom_generate=speculate)
        return
    got = model.generate(**inputs, **options, custom_generate=speculate)
    assert got.dtype == expected.dtype and torch.equal(got, expected)
    if not settings:
        assert (expected[-1, 9:] == eos).any()


def ignores_padding() -> bool:
    """Whether this transformers leaves padding out of the repetition penalty; 5.17 does not, 5.23 does."""
    return tuple(int(part) for part in tf.__version__.split(".")[:2]) >= (5, 23)


def test_rows_without_an_end_and_a_length_of_all(model, speculate) -> None:
    inputs = prompts(3)
    options = {"do_sample": False, "max_length": 20, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    assert expected.shape == (3, 20)
    assert torch.equal(model.generate(**inputs, **options, custom_generate=speculate), expected)


def test_the_end_pads_where_no_padding_token_is_named(model, speculate) -> None:
    inputs = prompts(3)
    options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": written_in_the_middle(model, inputs)}
    expected = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, custom_generate=speculate), expected)


def test_sampling_follows_the_seed_and_the_settings(model, speculate) -> None:
    options = {"do_sample": True, "max_new_tokens": 16, "eos_token_id": None, "pad_token_id": PAD}

    def draw(seed: int, **changes: object) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(**prompts(1), **options, **changes, custom_generate=speculate)

    greedy = model.generate(**prompts(1), **{**options, "do_sample": False})
    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    for narrow in ({"top_k": 1}, {"top_k": 0, "top_p": 1e-6}, {"top_k": 0, "min_p": 1.0}, {"temperature": 1e-5}):
        assert torch.equal(draw(3, **narrow), greedy)
    several = draw(3, num_return_sequences=3)
    assert several.shape == (3, 25) and len({tuple(row.tolist()) for row in several}) == 3


class Recorder:
    def __init__(self) -> None:
        self.values: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.values.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_hears_what_generate_tells_it(model) -> None:
    options = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": PAD}
    expected, heard = Recorder(), Recorder()
    model.generate(**prompts(1), **options, streamer=expected)
    ours = speculative_generate("suffix", arms="suffix:8", streamer=heard)
    model.generate(**prompts(1), **options, custom_generate=ours)
    assert heard.ended and heard.values == expected.values
    with pytest.raises(ValueError, match="this batch has 3"):
        model.generate(**prompts(3), **options, custom_generate=speculative_generate(streamer=heard))


class Foreign(tf.LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


class Never(tf.StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def filled_cache() -> tf.DynamicCache:
    cache = tf.DynamicCache()
    cache.update(torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 4, 16), 0)
    return cache


REFUSED = {
    "generation mode 'beam_search'": {"num_beams": 2, "do_sample": False},
    "generation mode 'assisted_generation'": {"prompt_lookup_num_tokens": 3, "do_sample": False},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "Foreign": {"logits_processor": tf.LogitsProcessorList([Foreign()])},
    "NoRepeatNGramLogitsProcessor": {"no_repeat_ngram_size": 2},
    "TypicalLogitsWarper": {"do_sample": True, "typical_p": 0.5},
    "skips a prompt": {
        "logits_processor": tf.LogitsProcessorList([tf.RepetitionPenaltyLogitsProcessor(1.2, prompt_ignore_length=9)])
    },
    "holds back other tokens": {
        "logits_processor": tf.LogitsProcessorList([tf.MinLengthLogitsProcessor(12, eos_token_id=7, device="cpu")])
    },
    "Never": {"stopping_criteria": tf.StoppingCriteriaList([Never()])},
    "MaxTimeCriteria": {"max_time": 1.0},
    "room for 55 more": {"max_new_tokens": 56},
    "pad prompts on the left": {"attention_mask": torch.tensor([[1] * 8 + [0]])},
    "position_ids": {"position_ids": torch.arange(9)[None] + 1},
    "past_key_values": {"past_key_values": filled_cache()},
    "inputs_embeds": {"inputs_embeds": torch.zeros(1, 9, 64)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_honoured_is_refused(reason, speculate) -> None:
    options = {**prompts(1), "max_new_tokens": 8, **REFUSED[reason]}
    with pytest.raises(ValueError, match=reason):
        llama(96).generate(**options, custom_generate=speculate)


def test_logits_that_are_not_finite_are_an_error(speculate) -> None:
    model = llama(96)
    options = {"do_sample": False, "max_new_tokens": 4, "custom_generate": speculative_generate(arms=["suffix:4"])}
    model.generate(**prompts(1), **options)
    model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FlashSpecError, match="row 0 met logits that are not finite"):
        model.generate(**prompts(1), **options)


def written_by_both(model: tf.PreTrainedModel) -> Tensor:
    options = {"do_sample": False, "max_new_tokens": 12}
    expected = model.generate(**prompts(1), **options)
    got = model.generate(**prompts(1), **options, custom_generate=speculative_generate(arms=["suffix:4"]))
    assert torch.equal(got, expected)
    return got


def test_weights_are_shared_and_an_engine_is_built_once() -> None:
    model = llama(96)
    first = written_by_both(model)
    engine = module._ENGINES[model][1]
    model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    assert not torch.equal(written_by_both(model), first)
    assert module._ENGINES[model][1] is engine
    model.lm_head = torch.nn.Linear(64, 96, bias=False).requires_grad_(False)
    written_by_both(model)
    assert module._ENGINES[model][1] is not engine


def test_an_engine_does_not_keep_its_model_alive() -> None:
    model = llama(96)
    written_by_both(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_fast_decoder_can_be_the_target() -> None:
    model = llama(96)
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": PAD}
    expected = model.generate(**prompts(3), **options)
    fast = speculative_generate(arms=["suffix:4"], load=load_model)
    assert torch.equal(model.generate(**prompts(3), **options, custom_generate=fast), expected)
