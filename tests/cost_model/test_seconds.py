"""Seconds of kernels: the roofline, efficiencies between points, what is shared, and sources."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from cost_model import (
    DATASHEETS,
    Cost,
    EfficiencyTable,
    Figure,
    Hardware,
    KernelCost,
    Multiprocessors,
    seconds,
    total,
)

B = sympy.Symbol("B", positive=True)
SOURCE = "measured on a test"
PEAK, HALF_PEAK, BANDWIDTH, LAUNCH = 1e9, 2e9, 1e8, 1e-5
SIZES = st.floats(1, 1e6)


def machine(**tables: EfficiencyTable) -> Hardware:
    return Hardware(
        "test",
        {"float32": Figure(PEAK, SOURCE), "bfloat16": Figure(HALF_PEAK, SOURCE)},
        Figure(BANDWIDTH, SOURCE),
        Figure(LAUNCH, SOURCE),
        {(kind, "float32"): table for kind, table in tables.items()},
    )


def kernel(
    flops: float = 0, moved: float = 0, dtype: str = "float32", **more: object
) -> KernelCost:
    return KernelCost("mm", Cost(flops, moved, 0), dtype, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        (kernel(flops=1e9, moved=1), 1.0),
        (kernel(flops=1, moved=1e8), 1.0),
        (kernel(flops=1e9, dtype="bfloat16"), 0.5),
        # A type without a figure counts as the slowest that has one.
        (kernel(flops=1e9, dtype="float64"), 1.0),
        (kernel(), 0.0),
    ],
)
def test_a_kernel_takes_the_longer_of_both_times_and_a_launch(
    cost: KernelCost, expected: float
) -> None:
    assert machine().kernel_s(cost) == pytest.approx(expected + LAUNCH)


def test_an_efficiency_divides_the_ideal_time() -> None:
    table = EfficiencyTable(("rows",), ((16.0,),), (0.25,))
    cost = kernel(flops=1e9, sizes={"rows": 16})
    assert machine(mm=table).kernel_s(cost) == pytest.approx(4 + LAUNCH)
    assert machine(mm=table).efficiency(cost).distance == 0
    # Without the size, or a table, nothing is known but the ideal.
    assert machine(mm=table).efficiency(kernel()) == (1.0, math.inf)


def test_shared_kernels_are_counted_once() -> None:
    rounding, product = kernel(moved=1e8, shared="bytes of x"), kernel(flops=1e9)
    other = kernel(moved=1e8, shared="bytes of g")
    kernels = [rounding, product, rounding, product, other]
    assert seconds(kernels, machine()) == pytest.approx(4 + 4 * LAUNCH)
    # The cost of products that stand alone counts all of them.
    assert total(kernels) == Cost(2e9, 3e8, 0)


def test_a_symbolic_batch_gets_its_value() -> None:
    table = EfficiencyTable(("rows",), ((8.0,), (16.0,)), (0.5, 0.25))
    cost = KernelCost("mm", Cost(1e9 * B, 0, 0), "float32", sizes={"rows": 8 * B})
    bound = kernel(flops=2e9, sizes={"rows": 16})
    assert seconds([cost], machine(mm=table), {B: 2}) == seconds([bound], machine(mm=table))
    with pytest.raises(ValueError, match="free symbols B"):
        machine(mm=table).ideal_s(cost)


def test_efficiencies_are_met_at_their_points() -> None:
    points = tuple((2.0**i, 2.0 ** (i % 3)) for i in range(12))
    efficiencies = tuple(0.2 + 0.06 * i for i in range(12))
    table = EfficiencyTable(("rows", "in"), points, efficiencies)
    for (rows, into), efficiency in zip(points, efficiencies, strict=True):
        estimate = table.at({"rows": rows, "in": into})
        assert estimate.efficiency == pytest.approx(efficiency, rel=0.05)
        assert estimate.distance == 0


def test_between_points_it_is_between_them_and_moves_little() -> None:
    table = EfficiencyTable(("rows",), ((16.0,), (64.0,), (256.0,)), (0.2, 0.4, 0.6))
    found = [table.at({"rows": 16 * 2 ** (i / 16)}).efficiency for i in range(65)]
    assert found == sorted(found)
    assert max(b / a for a, b in pairwise(found)) < 1.05


@given(rows=SIZES, into=SIZES)
def test_far_away_it_stays_in_the_range_that_was_measured(rows: float, into: float) -> None:
    points = ((16.0, 3.0), (64.0, 64.0), (256.0, 512.0), (4096.0, 16.0))
    table = EfficiencyTable(("rows", "in"), points, (0.2, 0.9, 0.6, 0.3))
    assert 0.2 <= table.at({"rows": rows, "in": into}).efficiency <= 0.9


def test_distances_are_in_octaves() -> None:
    table = EfficiencyTable(("rows", "in"), ((16.0, 16.0),), (0.5,))
    assert table.at({"rows": 16 * 2**3, "in": 16 * 2**4}).distance == pytest.approx(5)


@pytest.mark.parametrize(
    ("points", "efficiencies"),
    [((), ()), (((1.0,),), (0.5, 0.6)), (((1.0, 2.0),), (0.5,)), (((0.0,),), (0.5,)),
     (((1.0,),), (0.0,)), (((1.0,),), (math.nan,))],
)  # fmt: skip
def test_a_table_that_is_no_table_is_refused(
    points: tuple[tuple[float, ...], ...], efficiencies: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError, match="got"):
        EfficiencyTable(("rows",), points, efficiencies)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_figure_is_positive_and_finite(value: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        Figure(value, SOURCE)


def test_a_figure_without_a_source_is_refused() -> None:
    with pytest.raises(ValueError, match="source of a hardware figure"):
        Figure(1.0, "somebody said so")


def test_a_machine_needs_a_peak_and_a_kernel_a_kind() -> None:
    figure = Figure(1.0, SOURCE)
    with pytest.raises(ValueError, match="no peak for float32"):
        Hardware("test", {"bfloat16": figure}, figure, figure)
    with pytest.raises(ValueError, match="needs a kind"):
        KernelCost("", Cost.zero(), "float32")


@pytest.mark.parametrize("name", sorted(DATASHEETS))
def test_published_machines_are_labelled_and_ordered(name: str) -> None:
    hardware = DATASHEETS[name]
    assert not hardware.calibrated
    peaks = {dtype: figure.value for dtype, figure in hardware.peak_flops_per_s.items()}
    assert peaks["float32"] < peaks["bfloat16"] < peaks["int8"]
    assert all(peaks["float32"] <= peaks[name] for name in {"tf32", "float16", "float8"} & {*peaks})


@pytest.mark.parametrize("name", sorted({*DATASHEETS} - {"AVX-512 CPU"}))
def test_every_figure_of_a_gpu_has_a_source(name: str) -> None:
    """An address, or a label with the reason where nothing is published."""
    hardware, units = DATASHEETS[name], DATASHEETS[name].multiprocessors
    assert units is not None and {"tf32", "float16"} <= {*hardware.peak_flops_per_s}
    published = (*hardware.peak_flops_per_s.values(), hardware.launch_s, units.count)
    assert all(figure.source.startswith("https://") for figure in published)
    assert units.cache_bytes_per_s.source.startswith(("https://", "assumed: "))
    assert units.cache_bytes_per_s.value > hardware.bandwidth_bytes_per_s.value


UNITS = Multiprocessors(Figure(100, SOURCE), Figure(1e6, SOURCE), Figure(1e15, SOURCE))


@pytest.mark.parametrize(("tiles", "waves"), [(1, 1), (100, 1), (101, 2), (200, 2), (201, 3)])
def test_a_tile_too_many_takes_another_wave(tiles: int, waves: int) -> None:
    """All tiles are of the largest size: smaller ones would make no fewer waves of less."""
    peak = 100 * 2.0 * 32 * 32
    found = UNITS.product_s(32 * tiles, 32, 1, 1, "bfloat16", peak)
    assert found == pytest.approx(waves)


def test_a_large_product_reaches_the_peak_and_a_thin_one_waits_for_the_cache() -> None:
    flops = 2.0 * 4096 * 4096 * 4096
    whole = UNITS.product_s(4096, 4096, 4096, 1, "bfloat16", 1e12)
    assert flops / 1e12 <= whole <= 1.15 * flops / 1e12
    slow = dataclasses.replace(UNITS, cache_bytes_per_s=Figure(1e9, SOURCE))
    assert slow.product_s(4096, 4096, 4096, 1, "bfloat16", 1e12) > 2 * whole
    # Bytes are half as long.
    assert slow.product_s(4096, 4096, 4096, 1, "int8", 1e12) < 0.6 * slow.product_s(
        4096, 4096, 4096, 1, "bfloat16", 1e12
    )


def test_weight_gradients_share_out_what_is_contracted() -> None:
    sizes = {"in": 64, "out": 64, "groups": 1, "rows": 131072, "taps": 9}
    peak = 1e12
    flops = 2.0 * 64 * 64 * 131072 * 9
    for kind in ("convolution_weight", "sampled_wgrad", "convolution_input", "int8_forward"):
        assert flops / peak <= UNITS.of_kernel(kind, sizes, "bfloat16", peak) <= 1.3 * flops / peak
    assert UNITS.of_kernel("elementwise", {"bytes": 8}, "float32", peak) == 0


def test_what_fits_into_half_the_cache_moves_at_its_rate() -> None:
    hardware = dataclasses.replace(
        machine(), multiprocessors=dataclasses.replace(UNITS, cache_bytes=Figure(2e8, SOURCE))
    )
    assert hardware.ideal_s(kernel(moved=1e8)) == pytest.approx(1e8 / 1e15)
    assert hardware.ideal_s(kernel(moved=1.1e8)) == pytest.approx(1.1)
