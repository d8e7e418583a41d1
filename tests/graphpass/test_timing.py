"""Timing: the fastest call counts, of those that no other program disturbed."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from graphpass import timing


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Replace time: what a call takes, and what it waits of that, is added to it by hand."""
    passed = {"now": 0.0, "waited": 0.0}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: passed["now"])
    monkeypatch.setattr(timing, "_waited_s", lambda: passed["waited"])
    return passed


def test_functions_run_in_turn_and_the_fastest_call_of_each_counts(
    clock: dict[str, float],
) -> None:
    order: list[str] = []
    takes = {"a": iter([9.0, 3.0, 2.0, 4.0]), "b": iter([9.0, 5.0, 7.0, 6.0])}

    def run(name: str) -> None:
        order.append(name)
        clock["now"] += next(takes[name])

    runs = [lambda: run("a"), lambda: run("b")]
    found = timing.fastest(runs, 0.0, lambda: order.append("before"))
    assert found == timing.Fastest((2.0, 5.0), disturbed=False)
    assert order == ["a", "b", *["before", "a", "b"] * 3]


@pytest.mark.parametrize("calm", [True, False])
def test_calls_that_waited_for_a_processor_do_not_count(
    clock: dict[str, float], calm: bool
) -> None:
    calls: Iterator[float] = iter([1.0, *[2.0, 8.0] * 6])

    def run() -> None:
        seconds = next(calls)
        clock["now"] += seconds
        # The shorter calls are the disturbed ones: less would be believed of them than is true.
        clock["waited"] += 0.2 if calm else 1.0

    found = timing.fastest([run], 0.0, timing.nothing)
    assert found == timing.Fastest((8.0 if calm else 2.0,), disturbed=not calm)
    # Those that count are as many as are needed; where none does, there is an end as well.
    assert len(list(calls)) == (6 if calm else 0)


@pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists(), reason="this system does not count what waits"
)
def test_waiting_for_a_processor_is_seen() -> None:
    """Beside a program that wants the same processor, half of the time."""
    before = os.sched_getaffinity(0)
    alone = min(before)
    os.sched_setaffinity(0, {alone})
    try:
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            waited_s, end = timing._waited_s(), time.perf_counter() + 1.0
            while time.perf_counter() < end:
                pass
            assert timing._waited_s() - waited_s > 0.1
        finally:
            other.kill()
            other.wait()
    finally:
        os.sched_setaffinity(0, before)
