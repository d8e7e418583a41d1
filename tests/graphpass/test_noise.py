"""Tables of noise, and what noise does to the number of steps."""

import math

import pytest

from graphpass import ConfigError
from graphpass.methods.pixels import Params
from graphpass.noise import LocalNoise, NoiseTable, key_of, steps_inflation

DW1, DW2, DX2 = ("one:weight", "m", "{}"), ("two:weight", "m", "{}"), ("two:input", "m", "{}")
TABLE = NoiseTable(
    entries={
        DW1: LocalNoise(noise=0.3, bias=0.1, square=9.0),
        DW2: LocalNoise(noise=0.5, bias=0.2, square=9.0),
        DX2: LocalNoise(noise=0.02, bias=0.01, square=2.0),
    },
    variance={"one:weight": 3.0, "two:weight": 6.0, "norm.bias": 1.0},
    square={"one:weight": 1.0, "two:weight": 2.0, "norm.bias": 1.0},
    correction=1.5,
)


def test_steps_grow_with_the_share_that_noise_has() -> None:
    assert steps_inflation(0.1, TABLE.ratio) == pytest.approx(1 + 0.1 * 2.5 / 3.5)
    assert steps_inflation(0.1, math.inf) == pytest.approx(1.1)
    assert steps_inflation(0.0, 3.0) == 1


def test_a_table_survives_a_file() -> None:
    assert NoiseTable.from_json(TABLE.to_json()) == TABLE
    key = key_of("conv:weight", "pixels", Params(keep=0.5))
    assert key == key_of("conv:weight", "pixels", vars_of(Params(keep=0.5)))


def vars_of(params: Params) -> dict[str, object]:
    """Return the parameters as a plan has them, in another order."""
    names = sorted(Params.__dataclass_fields__, reverse=True)
    return {name: getattr(params, name) for name in names}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 9}', '{"version": 1}'])
def test_other_files_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no noise table"):
        NoiseTable.from_json(text)
