"""The random draws: their statistics, their range, and that compiled code draws the same bits.

Bounds follow from the sample size: a mean of n values is expected within 5 standard errors, and an
empirical distribution within the Dvoretzky-Kiefer-Wolfowitz bound. Seeds are fixed, so a test that
passes once passes always.
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from codegen import draws

COUNT = 1 << 16
STANDARD_ERRORS = 5
# Chance that an empirical distribution of true draws is out of its bound.
RISK = 1e-6
BITS = 31
RESOLUTION = 2.0**-23

SEEDS = (0, 1, 2, 3, 4, 1 << 15, 1 << 30, (1 << 31) - 1, 0x2545F491)
SALTS = (0, 1, 2, 3, 64, 0x3FFFFFFF)


def seed_of(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64)


def draw_uniform(seed: int, salt: int = 0, count: int = COUNT) -> Tensor:
    return draws.uniform(seed_of(seed), count, salt).double()


def draw_coarse(seed: int, salt: int = 0, count: int = COUNT) -> Tensor:
    return draws.coarse(seed_of(seed), count, salt).double()


def draw_normal(seed: int, salt: int = 0, count: int = COUNT) -> Tensor:
    return draws.normal(seed_of(seed), count, salt).double()


def uniform_cdf(x: Tensor) -> Tensor:
    return x.clamp(0, 1)


def normal_cdf(x: Tensor) -> Tensor:
    return torch.special.ndtr(x)


def distance(values: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    """Return the largest gap between the empirical and the true distribution function."""
    expected = cdf(values.sort().values)
    steps = torch.arange(len(values) + 1, dtype=torch.float64) / len(values)
    gaps = torch.stack([steps[1:] - expected, expected - steps[:-1]])
    return float(gaps.max())


def correlation(left: Tensor, right: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([left, right]))[0, 1])


@pytest.mark.parametrize("draw", [draw_uniform, draw_coarse])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("salt", SALTS)
def test_uniform_distribution(draw: Callable[[int, int], Tensor], seed: int, salt: int) -> None:
    values = draw(seed, salt)
    assert values.shape == (COUNT,)
    # Moments of U(0, 1): variance 1/12, and 1/180 is the variance of a squared deviation.
    assert abs(values.mean() - 1 / 2) < STANDARD_ERRORS * math.sqrt(1 / 12 / COUNT)
    assert abs(values.var() - 1 / 12) < STANDARD_ERRORS * math.sqrt(1 / 180 / COUNT)
    assert distance(values, uniform_cdf) < math.sqrt(math.log(2 / RISK) / (2 * COUNT))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("salt", SALTS)
def test_normal_distribution(seed: int, salt: int) -> None:
    values = draw_normal(seed, salt)
    assert values.shape == (COUNT,) and values.isfinite().all()
    # Moments of N(0, 1): skewness and excess kurtosis have variances 6 / n and 24 / n.
    assert abs(values.mean()) < STANDARD_ERRORS * math.sqrt(1 / COUNT)
    assert abs(values.var() - 1) < STANDARD_ERRORS * math.sqrt(2 / COUNT)
    assert abs((values**3).mean()) < STANDARD_ERRORS * math.sqrt(15 / COUNT)
    assert abs((values**4).mean() - 3) < STANDARD_ERRORS * math.sqrt(96 / COUNT)
    assert distance(values, normal_cdf) < math.sqrt(math.log(2 / RISK) / (2 * COUNT))


@pytest.mark.parametrize("draw", [draw_uniform, draw_coarse, draw_normal])
def test_few_draws_of_many_seeds_are_distributed_as_well(
    draw: Callable[[int, int, int], Tensor],
) -> None:
    """One small layer over a run: the seeds vary, the position hardly does."""
    values = torch.cat([draw(draws.mix(3, step, 0, 0), 77, 4) for step in range(4000)])
    cdf = normal_cdf if draw is draw_normal else uniform_cdf
    assert distance(values, cdf) < math.sqrt(math.log(2 / RISK) / (2 * len(values)))
    for position in range(4):
        column = values[position::4]
        assert distance(column, cdf) < math.sqrt(math.log(2 / RISK) / (2 * len(column)))


@pytest.mark.parametrize("draw", [draw_uniform, draw_coarse, draw_normal])
def test_streams_are_uncorrelated(draw: Callable[[int, int], Tensor]) -> None:
    """Between seeds, between salts, between a seed and the salt of the same number."""
    streams = [draw(seed, 5) for seed in SEEDS] + [draw(7, salt) for salt in SALTS]
    correlations = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    assert correlations.abs().max() < STANDARD_ERRORS / math.sqrt(COUNT)


@pytest.mark.parametrize("draw", [draw_uniform, draw_coarse, draw_normal])
@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 7, 8, 16, 32, 64, 1024, 4096])
def test_neighbours_are_uncorrelated(draw: Callable[[int, int], Tensor], lag: int) -> None:
    values = draw(11, 3)
    rest = len(values) - lag
    assert abs(correlation(values[lag:], values[:-lag])) < STANDARD_ERRORS / math.sqrt(rest)
    # In magnitude too: a sign may hide what two neighbours share.
    centred = (values - values.mean()) ** 2
    assert abs(correlation(centred[lag:], centred[:-lag])) < STANDARD_ERRORS / math.sqrt(rest)


def test_the_two_uniforms_of_a_normal_draw_are_independent() -> None:
    """Box-Muller is exact only if radius and angle are."""
    values = draw_normal(2, 9)
    above = values > 1
    expected = 1 - float(normal_cdf(torch.tensor(1.0, dtype=torch.float64)))
    pairs = float((above[1:] & above[:-1]).double().mean())
    error = math.sqrt(expected**2 * (1 - expected**2) / COUNT)
    assert abs(pairs - expected**2) < STANDARD_ERRORS * error
    radius, angle = draw_uniform(2, 18), draw_uniform(2, 19)
    assert abs(correlation(radius, angle)) < STANDARD_ERRORS / math.sqrt(COUNT)


def test_salts_and_seeds_tell_draws_apart() -> None:
    streams = [
        tuple(draws.uniform(seed_of(seed), 4, salt).tolist()) for seed in SEEDS for salt in SALTS
    ]
    assert len(set(streams)) == len(streams)


def test_the_interval_is_open_below() -> None:
    values = draw_uniform(0, 0, 1 << 22)
    assert values.min() >= RESOLUTION / 2 and values.max() <= 1 - RESOLUTION / 2
    # Among so many, values next to the ends are there.
    assert values.min() < 2.0**-18 and values.max() > 1 - 2.0**-18


def test_coarse_draws_are_odd_multiples() -> None:
    """Of 2**-16: their mean is 1/2 without the bias of a half-open interval."""
    values = draw_coarse(3, 4, 1 << 20) * 2**16
    assert set(values.unique().tolist()) == set(range(1, 2**16, 2))


def test_the_interval_is_open_above() -> None:
    # Found by search: places where the hash ends in 24 ones.
    for seed, position in ((27, 935207), (36, 919001), (59, 873647)):
        assert draw_uniform(seed, 0, position + 1)[position] < 1


def test_draws_depend_on_their_position_alone() -> None:
    for draw in (draw_uniform, draw_coarse):
        long, short = draw(5, 6, 1000), draw(5, 6, 10)
        assert torch.equal(long[:10], short)
        assert draw(5, 6, 0).shape == (0,)


def test_draws_leave_the_generator_alone() -> None:
    state = torch.get_rng_state()
    draw_normal(1, 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_types() -> None:
    for draw in (draws.uniform, draws.coarse, draws.normal):
        assert draw(seed_of(1), 3, 0).dtype == torch.float32


@pytest.mark.parametrize(
    ("draw", "salt"),
    [(draws.uniform, 0), (draws.uniform, 2 * 0x3FFFFFFF + 1), (draws.coarse, 5)],
)
def test_compiled_draws_are_the_same_bits(draw: Callable[..., Tensor], salt: int) -> None:
    compiled = torch.compile(lambda seed: draw(seed, 1000, salt), fullgraph=True)
    for seed in SEEDS:
        expected = draw(seed_of(seed), 1000, salt)
        assert torch.equal(compiled(seed_of(seed)), expected)


def test_compiled_normal_draws_are_the_same_to_the_last_bits() -> None:
    compiled = torch.compile(lambda seed: draws.normal(seed, 1000, 3), fullgraph=True)
    for seed in SEEDS:
        # Logarithm, root and cosine are rounded by whichever library computes them.
        expected = draws.normal(seed_of(seed), 1000, 3)
        tolerance = 4 * torch.finfo(torch.float32).eps * float(expected.abs().max())
        torch.testing.assert_close(compiled(seed_of(seed)), expected, atol=tolerance, rtol=0)


def test_a_symbolic_count_compiles_once() -> None:
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(
        lambda x, seed: draws.uniform(seed, x.numel(), 8), dynamic=True, fullgraph=True
    )
    for count in (3, 17, 64, 1000):
        x = torch.empty(count, 2)
        assert torch.equal(compiled(x, seed_of(9)), draws.uniform(seed_of(9), 2 * count, 8))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_mix_stays_in_range() -> None:
    words = (0, 1, 2, 1 << 30, (1 << 31) - 1, 1 << 40, -1)
    for count in range(4):
        for given in itertools.product(words, repeat=count):
            assert 0 <= draws.mix(*given) < 1 << BITS


def test_mix_is_a_pure_function() -> None:
    assert draws.mix(7, 100, 0, 3) == draws.mix(7, 100, 0, 3)


@pytest.mark.parametrize("place", range(4))
def test_mix_has_no_collisions_among_small_words(place: int) -> None:
    """Seeds, steps, repeats and callers are small numbers: they must not share draws."""
    words = [[7, 100, 1, 3] for _ in range(20_000)]
    for number, given in enumerate(words):
        given[place] = number
    assert len({draws.mix(*given) for given in words}) == len(words)


def test_mix_depends_on_order_and_number_of_words() -> None:
    given = [(1, 2, 3), (3, 2, 1), (2, 1, 3), (1, 2), (1, 2, 3, 0), (0, 1, 2, 3), (1,), (), (0,)]
    assert len({draws.mix(*words) for words in given}) == len(given)


@pytest.mark.parametrize("place", range(4))
def test_mix_avalanche(place: int) -> None:
    """Flipping any bit of any word flips each bit of the result with probability 1/2."""
    trials = 200
    flips = torch.zeros(BITS, BITS, dtype=torch.float64)
    for trial in range(trials):
        words = [7 + trial % 3, trial, trial % 2, trial // 5]
        before = draws.mix(*words)
        for bit in range(BITS):
            words[place] ^= 1 << bit
            changed = before ^ draws.mix(*words)
            words[place] ^= 1 << bit
            flips[bit] += torch.tensor([changed >> i & 1 for i in range(BITS)])
    rates = flips / trials
    error = math.sqrt(1 / 4 / trials)
    # 961 rates: their extremes may be further out than a single one, by a sixth standard error.
    assert (rates - 1 / 2).abs().max() < (STANDARD_ERRORS + 1) * error
    assert abs(rates.mean() - 1 / 2) < STANDARD_ERRORS * error / math.sqrt(BITS)


def test_mixed_seeds_of_successive_steps_are_evenly_distributed() -> None:
    seeds = torch.tensor([draws.mix(0, step, 0, 0) for step in range(20_000)])
    values = (seeds.double() + 0.5) / (1 << BITS)
    bound = math.sqrt(math.log(2 / RISK) / (2 * len(values)))
    assert distance(values, uniform_cdf) < bound
    assert abs(correlation(values[1:], values[:-1])) < STANDARD_ERRORS / math.sqrt(len(values) - 1)
