"""Every field has a range, and an error that names the field, the value and what would be right."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from fakes import MarkovModel
from pydantic import ValidationError

from flashspec import SpeculativeEngine
from flashspec.config import (
    BanditConfig,
    FlashSpecConfig,
    MetricsConfig,
    SamplingConfig,
    default_device,
    explain,
    gpu_fault,
)
from flashspec.models.loading import check_device, load_model

NAN, INF = float("nan"), float("inf")


def test_the_documented_defaults() -> None:
    sampling, bandit = SamplingConfig(), BanditConfig()
    assert (sampling.gamma, sampling.temperature, sampling.top_p, sampling.variant) == (4, 1.0, 1.0, "rejection")
    assert (bandit.window_size, bandit.ucb_exploration_constant) == (500, 1.0)
    assert (bandit.thompson_prior_alpha, bandit.thompson_prior_beta, bandit.n_arms) == (1.0, 1.0, None)
    assert FlashSpecConfig().device == default_device()


@pytest.mark.parametrize(
    ("field", "bad", "good"),
    [
        ("gamma", [0, -1, 65, 1.5], [1, 64]),
        ("temperature", [-1, NAN, INF, "hot"], [0, 0.7, 5]),
        ("top_k", [-2, 1.5], [-1, 0, 50]),
        ("top_p", [0, -0.1, 1.1, NAN], [0.01, 1]),
        ("min_p", [-0.1, 1.1, NAN], [0, 1]),
        ("repetition_penalty", [0, -1, NAN, INF], [0.5, 1.3]),
        ("presence_penalty", [-2.1, 2.1, NAN], [-2, 2]),
        ("frequency_penalty", [-2.1, 2.1, NAN], [-2, 2]),
        ("logit_bias", [{3: NAN}, {3: 1e5}, {"x": 1.0}], [{}, {3: -100.0}]),
        ("min_tokens", [-1], [0, 10]),
        ("stop", [("",), ("a", ""), "text"], [(), ("a", "b")]),
        ("logprobs", [-1, 21], [None, 0, 20]),
        ("seed", [-1, 2**63], [None, 0, 2**63 - 1]),
        ("variant", ["exact"], ["rejection", "coupled", "typical"]),
        ("typical_epsilon", [0, 1.1, NAN], [0.5]),
        ("typical_delta", [0, 1.1, NAN], [0.5]),
    ],
)
def test_sampling_ranges(field: str, bad: list, good: list) -> None:
    for value in bad:
        with pytest.raises(ValidationError) as caught:
            SamplingConfig(**{field: value})
        assert field in explain(caught.value)
    for value in good:
        assert getattr(SamplingConfig(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (BanditConfig, {"strategy": "greedy"}),
        (BanditConfig, {"n_arms": 0}),
        (BanditConfig, {"window_size": -1}),
        (BanditConfig, {"ucb_exploration_constant": NAN}),
        (BanditConfig, {"thompson_prior_alpha": 0}),
        (BanditConfig, {"thompson_prior_beta": -1}),
        (MetricsConfig, {"latency_window": 0}),
        (FlashSpecConfig, {"device": "tpu"}),
        (FlashSpecConfig, {"dtype": "int3"}),
        (FlashSpecConfig, {"max_new_tokens": 0}),
        (FlashSpecConfig, {"sampling": {"temperature": -1}}),
        (FlashSpecConfig, {"temprature": 1.0}),
    ],
)
def test_other_ranges(kind: type, changes: dict) -> None:
    with pytest.raises(ValidationError) as caught:
        kind(**changes)
    assert next(iter(changes)) in explain(caught.value)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        SamplingConfig().gamma = 3  # type: ignore[misc]


def test_an_explanation_is_one_sentence() -> None:
    with pytest.raises(ValidationError) as caught:
        FlashSpecConfig(sampling={"temperature": -1, "top_p": 0})
    assert explain(caught.value) == (
        "sampling.temperature is -1: input should be greater than or equal to 0; "
        "sampling.top_p is 0: input should be greater than 0"
    )
    for device in ("tpu", "cpu:foo", "cuda:", "cuda:x"):
        with pytest.raises(ValidationError) as caught:
            FlashSpecConfig(device=device)
        assert explain(caught.value).endswith(f"device is {device!r}; it should be 'cpu', 'cuda' or 'cuda:N'")


class Driver:
    """What torch says of a machine's driver. The count of GPUs may come from NVML, which an old driver has too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
        self.fault = fault
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", self.is_available)
        monkeypatch.setattr(torch.cuda, "init", self.init)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def is_available(self) -> bool:
        warnings.warn(f"CUDA initialization: {self.fault}", UserWarning, stacklevel=1)
        return not self.fault

    def init(self) -> None:
        raise RuntimeError(self.fault)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Driver]]:
    known = gpu_fault, default_device
    for function in known:
        function.cache_clear()
    yield lambda fault: Driver(monkeypatch, fault)
    for function in known:
        function.cache_clear()


OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading"
NONE = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver from"


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (
            OLD,
            "torch is built for CUDA 13.0, but the NVIDIA driver on your system is too old (found version 11040): inst",
        ),
        (NONE, "torch is built for CUDA 13.0, but found no NVIDIA driver on your system: install the latest"),
    ],
)
def test_a_driver_that_does_not_fit_torch_is_said_in_one_sentence(
    driver: Callable[[str], Driver], fault: str, sentence: str
) -> None:
    driver(fault)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", RuntimeWarning)
        assert [FlashSpecConfig().device for _ in range(3)] == ["cpu"] * 3
    warned = [str(each.message) for each in told if each.category is RuntimeWarning]
    assert len(warned) == (fault == OLD)  # a machine without a GPU need not have a driver
    assert all(text.startswith(f"the CPU is used: {sentence}") and "\n" not in text for text in warned)
    for ask in (lambda: check_device(torch.device("cuda")), lambda: load_model("smollm2", device="cuda:0")):
        with pytest.raises(ValueError) as caught:
            ask()
        assert sentence in str(caught.value)


def test_other_gpus_than_the_first_are_refused(
    driver: Callable[[str], Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only where a model is loaded: it may come with its device."""
    driver("")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    sentence = r"device is 'cuda:1'; .*: set CUDA_VISIBLE_DEVICES=1 and ask for 'cuda'"
    target = MarkovModel.random(6, seed=3)
    target.device = torch.device("cuda:1")
    for ask in (
        lambda: check_device("cuda:1"),
        lambda: load_model("smollm2", device="cuda:1"),
        lambda: SpeculativeEngine({"device": "cpu"}, ["ngram"], target),
    ):
        with pytest.raises(ValueError, match=sentence):
            ask()


def test_a_machine_without_a_gpu_and_one_that_is_fine_are_told_nothing(driver: Callable[[str], Driver]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        driver("No CUDA GPUs are available")
        assert FlashSpecConfig().device == "cpu" and not gpu_fault()
        gpu_fault.cache_clear()
        default_device.cache_clear()
        driver("")
        assert FlashSpecConfig().device == "cuda:0"
