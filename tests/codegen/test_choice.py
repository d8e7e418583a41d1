"""Which tiles are tried, which way is launched, and what is remembered of it; no GPU needed."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from codegen.gpu import build as gpu_build
from codegen.gpu import choice, tiles
from codegen.gpu.source import Program
from codegen.kernel import _GpuRunner, kernels, run_program, triton_programs
from cost_model import DATASHEETS

MACHINE = "a GPU, torch 1, Triton 1"
Run = Callable[[], object]


class Clock:
    """A timer that runs what it times, and gives the figures that a way returns."""

    def __init__(self) -> None:
        self.timed: list[object] = []

    def __call__(self, run: Run) -> float:
        seconds: Any = run()
        self.timed.append(seconds)
        return float(seconds)


def _out_of_memory() -> object:
    raise RuntimeError("out of resource: shared memory, Required: 262144")


WAYS: dict[str, Run] = {"wide": _out_of_memory, "slow": lambda: 3.0, "fast": lambda: 2.0}


def test_the_fastest_is_taken_and_what_fails_is_left_out(tmp_path: Path) -> None:
    outcome = choice.fastest(tmp_path / "kernel.py", WAYS, MACHINE, Clock())
    assert outcome.fastest == "fast" and outcome.seconds == {"slow": 3.0, "fast": 2.0}
    assert "shared memory" in outcome.failed["wide"]


def test_the_next_process_does_not_time_again_on_the_same_device(tmp_path: Path) -> None:
    first = choice.fastest(tmp_path / "kernel.py", WAYS, MACHINE, Clock())
    again, other = Clock(), Clock()
    assert choice.fastest(tmp_path / "kernel.py", WAYS, MACHINE, again) == first
    assert not again.timed
    choice.fastest(tmp_path / "kernel.py", WAYS, "another GPU", other)
    assert other.timed == [3.0, 2.0]


@pytest.mark.parametrize("damage", ["{", "[]", '{"fastest": "gone", "seconds": {}, "failed": {}}'])
def test_a_file_that_says_nothing_of_use_is_ignored(tmp_path: Path, damage: str) -> None:
    choice.fastest(tmp_path / "kernel.py", WAYS, MACHINE, Clock())
    (kept,) = tmp_path.glob("*.json")
    kept.write_text(damage)
    clock = Clock()
    assert choice.fastest(tmp_path / "kernel.py", WAYS, MACHINE, clock).fastest == "fast"
    assert clock.timed == [3.0, 2.0]
    assert json.loads(kept.read_text())["fastest"] == "fast"


def test_what_was_compared_with_nothing_is_not_remembered(tmp_path: Path) -> None:
    ways: dict[str, Run] = {"wide": _out_of_memory, "slow": lambda: 3.0}
    assert choice.fastest(tmp_path / "kernel.py", ways, MACHINE, Clock()).fastest == "slow"
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="out of resource"):
        choice.fastest(tmp_path / "kernel.py", {"wide": _out_of_memory}, MACHINE, Clock())


def test_a_short_list_is_short_and_in_the_order_of_predicted_time() -> None:
    works = [
        tiles.Work(rows, columns, steps, 64, 1, 2, least, shared=least == 64)
        for rows in (512, 8192, 131072)
        for columns in (16, 256, 2304)
        for steps in (1, 36, 2048)
        for least in (32, 64)
    ]
    for work in works:
        listed = tiles.short_list(work)
        clocks = [tiles.clocks(work, tile) for tile in listed]
        assert 1 <= len(listed) <= tiles.LONGEST and len(set(listed)) == len(listed)
        assert clocks == sorted(clocks) and clocks[-1] <= 1.25 * clocks[0]
        assert all(tile.high <= max(16, 2 * work.rows) for tile in listed)
    assert max(len(tiles.short_list(work)) for work in works) > 1


def test_few_tiles_are_shared_out_and_many_are_not() -> None:
    deep = tiles.Work(64, 64, 4096, 64, 1, 2, 64, shared=True)
    assert tiles.best(deep).splits > 16
    many = dataclasses.replace(deep, rows=128 * 132, columns=128, steps=16)
    assert tiles.best(many) == tiles.Tile(128, 128, 1)


def test_rates_are_those_of_the_cost_model() -> None:
    """NOTE [Why codegen has figures of hardware], in `codegen.gpu.tiles`."""
    machine = DATASHEETS["H200"]
    peaks = {dtype: figure.value for dtype, figure in machine.peak_flops_per_s.items()}
    for itemsize, dtype in {1: "int8", 4: "tf32"}.items():
        ratio = tiles.PRODUCTS[itemsize] / tiles.PRODUCTS[2]
        assert peaks[dtype] / peaks["bfloat16"] == pytest.approx(ratio, rel=0.01)
    intensity = peaks["bfloat16"] / machine.bandwidth_bytes_per_s.value
    assert 2 * tiles.PRODUCTS[2] / tiles.MEMORY_BYTES == pytest.approx(intensity, rel=0.01)


needs_triton = pytest.mark.skipif(
    gpu_build.toolchain() is not None, reason=gpu_build.toolchain() or "Triton is here"
)


def _by_rank(x: Tensor) -> Program:
    """Return programs that leave the width of their tile in the result."""
    work = tiles.Work(2048, 512, 36, 64, 1, 2, 32)
    tile = tiles.best(work)
    text = f"def run(x, result):\n    result.fill_({tile.high} * 1000 + {tile.wide})\n"
    return Program(text)


def _ranked() -> Any:
    return dataclasses.replace(kernels()["absolute_max"], emit_triton=_by_rank)


@needs_triton
def test_programs_differ_in_their_tiles_and_the_predicted_one_is_first() -> None:
    programs = triton_programs(_ranked(), torch.ones(4))
    assert not isinstance(programs, str) and len(programs) > 1
    assert programs[0] == _by_rank(torch.ones(4)) and len(set(programs)) == len(programs)


@needs_triton
@pytest.mark.usefixtures("fresh_cache")
def test_the_program_that_was_fastest_is_launched_and_by_the_next_process_too() -> None:
    kernel, x = _ranked(), torch.ones(4)
    programs = triton_programs(kernel, x)
    assert not isinstance(programs, str)

    results = [float(run_program(kernel, gpu_build.load("x", p), p, x)) for p in programs]

    def prefers(run: Run) -> float:
        """Return least for the second program, whose result tells which it is."""
        return 1.0 if run() == results[1] else 2.0

    wanted = results[1]
    assert float(_GpuRunner(kernel, prefers)(x)) == wanted
    clock = Clock()
    assert float(_GpuRunner(kernel, clock)(x)) == wanted and not clock.timed


@needs_triton
@pytest.mark.usefixtures("fresh_cache")
def test_plain_torch_stays_where_it_is_faster() -> None:
    """No warning: it is what the vendor's library does best."""
    run = _GpuRunner(_ranked(), lambda run: float(run()))  # type: ignore[arg-type]
    assert float(run(torch.full((4,), -7.0))) == 7.0
