"""Sparse training is counted as SWAT counts it, and its machine waits for its slowest row."""

import math
import random

import pytest

from cost_model.accelerator import SparseArray, SparseProduct, cycles, speedup
from cost_model.sparsity import SparseLayer, erk_densities, saved, uniform_densities

LAYERS = (
    SparseLayer("first", (8, 3, 3, 3), 100, 300),
    SparseLayer("conv", (16, 8, 3, 3), 100, 800),
    SparseLayer("fc", (10, 16), 1, 16),
)


def test_what_is_saved_is_weighted_by_flops_weights_and_values() -> None:
    result = saved(LAYERS, (1.0, 0.25, 0.5), normalised=400)
    first, conv, fc = (layer.flops for layer in LAYERS)
    assert (first, conv, fc) == (43_200, 230_400, 320)
    # The first layer has two products, others three.
    spared = 3 * (0.75 * conv + 0.5 * fc)
    assert result.training_flops == pytest.approx(spared / (2 * first + 3 * (conv + fc)))
    assert result.inference_flops == pytest.approx(spared / 3 / (first + conv + fc))
    assert result.weights == pytest.approx((0.75 * 1152 + 0.5 * 160) / (216 + 1152 + 160))
    assert result.layer_inputs == pytest.approx((600 + 8) / 1116)
    assert result.activations == pytest.approx((600 + 8) / 1516)


def test_uniform_leaves_the_first_layer_dense() -> None:
    assert uniform_densities(LAYERS, 0.1) == (1.0, 0.1, 0.1)


def test_erk_keeps_the_wanted_share_in_proportion_to_the_sum_of_sizes() -> None:
    shapes = [(64, 64, 3, 3), (128, 64, 3, 3), (256, 128, 3, 3), (10, 256)]
    densities = erk_densities(shapes, 0.1)
    sizes = [math.prod(shape) for shape in shapes]
    kept = sum(size * density for size, density in zip(sizes, densities, strict=True))
    assert kept == pytest.approx(0.1 * sum(sizes))
    ratios = [
        density * size / sum(shape)
        for shape, size, density in zip(shapes, sizes, densities, strict=True)
        if density < 1
    ]
    assert max(ratios) == pytest.approx(min(ratios)) and max(densities) <= 1


def test_erk_makes_small_layers_dense() -> None:
    densities = erk_densities([(4, 4), (512, 512)], 0.1)
    assert densities[0] == 1.0 and densities[1] < 0.1
    with pytest.raises(ValueError, match="density"):
        erk_densities([(4, 4)], 0.0)


@pytest.mark.parametrize("balanced", [True, False])
def test_expected_cycles_are_the_mean_of_simulated_ones(balanced: bool) -> None:
    product = SparseProduct(filters=6, length=40, positions=5, density=0.3)
    array = SparseArray(rows=4, columns=2, lanes=8, balanced=balanced)
    draw, total, runs = random.Random(0), 0, 2000
    for _ in range(runs):
        for rows in (4, 2):
            lanes = [[draw.random() < 0.3 for _ in range(40)] for _ in range(rows)]
            if balanced:
                steps = [math.ceil(sum(row) / 8) for row in lanes]
            else:
                steps = [sum(row[lane::8]) for row in lanes for lane in range(8)]
            total += max(steps) * 3
    assert cycles(product, array) == pytest.approx(total / runs, rel=0.02)


def test_short_vectors_gain_less_than_their_zeros_promise() -> None:
    array = SparseArray()
    gains = [speedup([SparseProduct(64, length, 64, 0.1)], array) for length in (64, 576, 100_000)]
    assert gains == sorted(gains) and gains[0] < 5 < gains[1] < gains[2] < 10
    assert cycles(SparseProduct(16, 32, 16, 1.0), array) == 2
    assert cycles(SparseProduct(16, 32, 16, 0.0), array) == 0
