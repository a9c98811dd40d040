import pytest
import torch
from scipy import stats
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flashspec.kernels import native_build, native_verify, philox_gumbel, philox_uniform, reference
from flashspec.kernels.reference import philox4x32

SEED = torch.tensor([20_240_229])


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    words = philox4x32(*(torch.tensor([word]) for word in counter + key))
    assert [int(word) for word in words] == expected


def test_uniforms_lie_strictly_inside_the_unit_interval() -> None:
    u = philox_uniform(SEED, torch.arange(200_000).view(1, -1), purpose=3)
    assert u.dtype == torch.float32
    assert 0 < u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    assert torch.equal(u * 2**24 % 2, torch.ones_like(u))


def test_uniforms_and_noise_pin_words_seed_position_and_purpose() -> None:
    """Counter (token // 4, position low, purpose, position high), key (seed low, high), word token % 4."""
    seed, position, purpose, token = -(2**40) - 7, 5 * 2**32 + 9, 2**31 + 1, 6
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    first, other = (
        philox4x32(*(torch.tensor([word]) for word in (group, 9, purpose, 5, low, high))) for group in (0, 1)
    )
    seeds, positions = torch.tensor([seed]), torch.tensor([[position]])
    assert philox_uniform(seeds, positions, purpose).item() == ((int(first[0]) >> 8) | 1) / 2**24
    noise = philox_gumbel(seeds, positions, purpose, 8)[0, 0, token].double()
    uniform = other[token % 4].double() / 2**32
    assert noise == pytest.approx(-torch.log(-torch.log1p(-uniform)).item(), abs=1e-5)


def test_uniforms_are_uniform() -> None:
    u = philox_uniform(torch.arange(100), torch.arange(500).expand(100, 500), purpose=1)
    counts = torch.histc(u, bins=64, min=0, max=1)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_gumbel_max_draws_from_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -2.0, 0.5, -1.0, 2.0, -0.5])
    noise = philox_gumbel(SEED, torch.arange(40_000).view(1, -1), purpose=2, vocab_size=7)
    counts = torch.bincount((logits + noise).argmax(-1).flatten(), minlength=7)
    assert stats.chisquare(counts.numpy(), (logits.double().softmax(0) * 40_000).numpy()).pvalue > 1e-3


def test_gumbel_noise_follows_its_distribution_over_a_whole_vocabulary() -> None:
    noise = philox_gumbel(SEED, torch.tensor([[7]]), purpose=2, vocab_size=49_152)
    assert noise.shape == (1, 1, 49_152)
    assert noise.is_contiguous()
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-3


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    seeds = torch.tensor([3, -1, 2**60])
    positions = torch.tensor([[0, 1], [2**31, 5], [9, 2**40]])
    uniforms, noise = philox_uniform(seeds, positions, 4), philox_gumbel(seeds, positions, 4, 10)
    for row in range(3):
        for column in range(2):
            one = seeds[row : row + 1], positions[row : row + 1, column : column + 1]
            assert torch.equal(philox_uniform(*one, 4)[0, 0], uniforms[row, column])
            assert torch.equal(philox_gumbel(*one, 4, 10)[0, 0], noise[row, column])


@pytest.mark.parametrize("vocab_size", [1, 3, 4, 101])
def test_a_tokens_noise_does_not_depend_on_the_vocabulary(vocab_size: int) -> None:
    larger = philox_gumbel(SEED, torch.tensor([[1, 2]]), 0, 128)
    assert torch.equal(philox_gumbel(SEED, torch.tensor([[1, 2]]), 0, vocab_size), larger[..., :vocab_size])


def correlation(left: Tensor, right: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1])


def test_seeds_positions_and_purposes_are_independent() -> None:
    n = 40_000
    positions = torch.arange(n).view(1, n)
    u = philox_uniform(SEED, positions, 0)
    others = [
        philox_uniform(SEED + 1, positions, 0),
        philox_uniform(SEED + 2**32, positions, 0),
        philox_uniform(SEED, positions + 1, 0),
        philox_uniform(SEED, positions + 2**32, 0),
        philox_uniform(SEED, positions, 1),
    ]
    for other in others:
        assert abs(correlation(u, other)) < 4 / n**0.5
    noise = philox_gumbel(SEED, positions, 0, 6)
    for token in range(1, 6):
        assert abs(correlation(noise[..., 0], noise[..., token])) < 4 / n**0.5


def test_no_rows_and_no_positions() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert philox_uniform(none, none.view(0, 3), 0).shape == (0, 3)
    assert philox_gumbel(SEED, none.view(1, 0), 0, 5).shape == (1, 0, 5)


def test_nothing_is_read_back_to_the_host() -> None:
    with FakeTensorMode():
        seeds, positions = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)
        assert philox_uniform(seeds, positions, 1).shape == (2, 3)
        assert philox_gumbel(seeds, positions, 1, 50_257).shape == (2, 3, 50_257)


@pytest.mark.parametrize(
    ("seeds", "positions", "purpose", "message"),
    [
        (torch.zeros(2).long(), torch.zeros(2).long(), 0, r"positions should be \(B, Q\)"),
        (torch.zeros(2).long(), torch.zeros(2, 3), 0, "positions should be torch.int64"),
        (torch.zeros(3).long(), torch.zeros(2, 3).long(), 0, r"seeds should have shape \(2,\)"),
        (torch.zeros(2).int(), torch.zeros(2, 3).long(), 0, "seeds should be torch.int64"),
        (torch.zeros(2).long(), torch.zeros(2, 3).long(), -1, "purpose should be in"),
        (torch.zeros(2).long(), torch.zeros(2, 3).long(), 2**32, "purpose should be in"),
    ],
)
def test_noise_names_what_is_wrong(seeds: Tensor, positions: Tensor, purpose: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        philox_uniform(seeds, positions, purpose)
    with pytest.raises(ValueError, match=message):
        philox_gumbel(seeds, positions, purpose, 10)


def test_noise_needs_a_vocabulary() -> None:
    with pytest.raises(ValueError, match="vocab_size should be at least 1: got 0"):
        philox_gumbel(SEED, torch.tensor([[0]]), 0, 0)


@pytest.mark.skipif(not native_build.available(), reason=native_build.why_not() or "built")
@pytest.mark.parametrize("vocab_size", [1, 63, 64, 1000, 8193])
def test_the_native_noise_is_its_twins(vocab_size: int) -> None:
    seeds, positions = torch.tensor([5, -(2**40) - 7]), torch.tensor([[0, 2**33 + 1, 9], [2**31, 3, 4]])
    expected = reference.philox_gumbel(seeds, positions, 2**31 + 1, vocab_size)
    noise = native_verify.philox_gumbel(seeds, positions, 2**31 + 1, vocab_size)
    torch.testing.assert_close(noise, expected, atol=3e-6, rtol=0)
