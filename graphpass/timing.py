"""How this machine's speed is measured: the best of several calls, in memory that stays."""

import ctypes
import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

# Parameters of glibc's mallopt (malloc.h), and a size that nothing here reaches.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _NEVER = -1, -3, 2**31 - 1
# Calls that a figure rests on at least and at most, however long one takes.
_LEAST_CALLS, _MOST_CALLS = 3, 12
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


def best_s(run: Callable[[], object], limit_s: float, warm: bool = False) -> float:
    """Return the seconds of the fastest of several calls, after one that does not count.

    Before each call the caches are filled with something else: in a training step, what a product
    reads was mostly written long ago. On two cores that share 32 MB of cache, the convolutions of a
    ResNet-20 step took 92 ms one by one like this, 77 ms with operands in the cache, and 105 ms in
    the step. What other programs do can only make a call slower, so the fastest tells most.

    Args:
        run: what is timed.
        limit_s: when to stop calling it.
        warm: whether the caches are left as the call before left them.
    """
    end = time.perf_counter() + limit_s
    run()
    best, calls = float("inf"), 0
    while calls < _LEAST_CALLS or (calls < _MOST_CALLS and time.perf_counter() < end):
        if not warm:
            _other_data().add_(1)
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
        calls += 1
    return best


@cache
def _other_data() -> Tensor:
    return torch.zeros(_CACHE_BYTES, dtype=torch.uint8)
