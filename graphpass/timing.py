"""How this machine's speed is measured: the best of several calls, in memory that stays."""

import contextlib
import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# Parameters of glibc's mallopt (malloc.h), and a size that nothing here reaches.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _NEVER = -1, -3, 2**31 - 1
# Calls that a figure rests on at least and at most, however long one takes.
_LEAST_CALLS, _MOST_CALLS = 3, 12
# Of the time of a call, what its threads may wait for a processor in one that counts.
_LARGEST_WAIT = 0.05
# No less than the caches of a processor hold.
_CACHE_BYTES = 2**26


def keep_memory() -> None:
    """Let freed memory stay with the process, where the C library is glibc.

    Otherwise a large tensor's memory goes back to the system when the tensor dies, and the next
    one's comes in by page faults. Of an exact ResNet-20 step of 194 ms that took 55 ms, of a
    planned one of 96 ms 15, and whether it happens depends on what the process did before. Figures
    taken with it would flatter plans, and vary.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _NEVER)
        mallopt(_MMAP_THRESHOLD, _NEVER)


@dataclass(frozen=True, slots=True)
class Fastest:
    """What timing came to.

    Attributes:
        seconds: of each function, the fastest of its calls.
        disturbed: whether other programs took processors away during every call.
    """

    seconds: tuple[float, ...]
    disturbed: bool


def best_s(run: Callable[[], object], limit_s: float, warm: bool = False) -> float:
    """Return the seconds of the fastest of several calls; see `fastest`.

    Args:
        run: what is timed.
        limit_s: when to stop calling it.
        warm: whether the caches are left as the call before left them.
    """
    return fastest((run,), limit_s, nothing if warm else fill_caches).seconds[0]


def fastest(
    runs: Sequence[Callable[[], object]],
    limit_s: float,
    before: Callable[[], object],
    least: int = _LEAST_CALLS,
) -> Fastest:
    """Return the seconds of functions that are called one after the other, several times.

    The first time does not count. What other programs do can only make a call slower, so the
    fastest tells most; on a machine that is busy throughout, a product of 3 ms on two threads took
    17 ms at best, most of it waiting for the thread that another program's had put aside.

    Args:
        runs: what is timed.
        limit_s: when to stop calling it.
        before: what is done each time before, untimed; see `fill_caches`.
        least: calls that count, at least, unless all were disturbed.
    """
    end = time.perf_counter() + limit_s
    for run in runs:
        run()
    turns: list[tuple[bool, list[float]]] = []
    calm = 0
    while calm < least or (calm < _MOST_CALLS and time.perf_counter() < end):
        if len(turns) == _MOST_CALLS:
            break
        before()
        waited_s = _waited_s()
        seconds = [_clock(run) for run in runs]
        disturbed = _waited_s() - waited_s > _LARGEST_WAIT * sum(seconds)
        turns.append((disturbed, seconds))
        calm += not disturbed
    counted = [seconds for disturbed, seconds in turns if not disturbed or not calm]
    return Fastest(tuple(map(min, zip(*counted, strict=True))), not calm)


def fill_caches() -> None:
    """Fill the caches with other data.

    In a training step, what a product reads was mostly written long ago. On two cores that share
    32 MB of cache, the convolutions of a ResNet-20 step took 92 ms one by one like this, 77 ms with
    operands in the cache, and 105 ms in the step.
    """
    _other_data().add_(1)


def fill_caches_but(fresh: Tensor) -> None:
    """Leave in the caches what a product finds there in a step: what was computed last."""
    fill_caches()
    fresh.mul_(1)


def nothing() -> None:
    """Leave the caches as they are."""


def _clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _waited_s() -> float:
    """Return how long threads of this process were ready to run and had no processor, so far.

    Linux counts it, in nanoseconds; elsewhere it is 0.
    """
    waited = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        # A thread may end meanwhile.
        with contextlib.suppress(OSError):
            waited += int(path.read_text().split()[1])
    return 1e-9 * waited


@cache
def _other_data() -> Tensor:
    return torch.zeros(_CACHE_BYTES, dtype=torch.uint8)
