"""The forms of a budget, and the curve from noise to accuracy."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphpass import AccuracyDrop, ConfigError, Speedup
from graphpass.curve import Curve, fit


@pytest.mark.parametrize("factor", [0.9, 0, -1, math.nan, math.inf, True, "2", None, 10**400])
def test_illegal_speedups(factor: object) -> None:
    with pytest.raises(ConfigError, match=r"Speedup\(.*\): give a finite number .* at least 1"):
        Speedup(factor)  # type: ignore[arg-type]


@pytest.mark.parametrize("points", [0, -0.1, math.nan, math.inf, True, "1"])
def test_illegal_drops(points: object) -> None:
    with pytest.raises(ConfigError, match=r"AccuracyDrop\(.*\): give a finite number of points"):
        AccuracyDrop(points)  # type: ignore[arg-type]


def test_a_drop_without_a_curve_says_where_to_get_one() -> None:
    with pytest.raises(ConfigError, match=r"AccuracyDrop\(0\.3\): .*graphpass\.tune\(train"):
        _ = AccuracyDrop(0.3).tau
    with pytest.raises(ConfigError, match="give the curve of what"):
        AccuracyDrop(0.3, 5.0)  # type: ignore[arg-type]


@given(
    st.floats(50, 100), st.floats(0.1, 20), st.floats(0.1, 1),
    st.lists(st.floats(0.01, 3), min_size=2, max_size=8, unique_by=lambda tau: round(tau, 2)),
)  # fmt: skip
def test_a_curve_is_recovered_from_its_own_points(
    exact: float, slope: float, saturation: float, taus: list[float]
) -> None:
    truth = Curve(exact, slope, 0.0, saturation, max(taus))
    fitted = fit(taus, [exact - truth.drop(tau) for tau in taus], saturation)
    assert fitted.slope == pytest.approx(slope, rel=1e-3, abs=1e-6)
    assert fitted.exact == pytest.approx(exact, rel=1e-6)
    tau = 0.5 * max(taus)
    assert fitted.tau_for(fitted.drop(tau)) == pytest.approx(tau, rel=1e-6)


def test_nothing_is_extrapolated() -> None:
    curve = Curve(90.0, 2.0, 0.1, 0.8, largest_tau=0.7)
    assert curve.tau_for(50.0) == 0.7
    assert Curve(90.0, 0.0, 0.1, 0.8, 0.7).tau_for(0.1) == 0.7


def test_a_rising_curve_is_taken_for_a_flat_one() -> None:
    assert fit([0.0, 1.0, 2.0], [80.0, 81.0, 82.0], 0.5).slope == 0


def test_the_interval_covers_the_slope_in_about_95_of_100_cases() -> None:
    import random

    source, covered = random.Random(0), 0
    taus = [0.0, 0.1, 0.3, 0.5, 1.0]
    truth = Curve(90.0, 3.0, 0.0, 0.8, 1.0)
    for _ in range(400):
        drawn = [truth.exact - truth.drop(tau) + source.gauss(0, 0.2) for tau in taus]
        found = fit(taus, drawn, 0.8)
        covered += abs(found.slope - truth.slope) <= found.slope_error
    assert 0.91 <= covered / 400 <= 0.985


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit([0.1, 0.1], [1.0, 2.0], 0.5), "all of 2 have tau 0.1"),
        (lambda: fit([0.1, 0.2], [1.0, math.nan], 0.5), "finite numbers"),
    ],
)
def test_what_cannot_be_fitted(call: Callable[[], Curve], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
    assert fit([0.1, 0.2], [1.0, 0.5], 0.5).slope_error == math.inf
