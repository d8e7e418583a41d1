"""Timing on a GPU without the host in it: recorded as a CUDA graph, replayed, timed by events."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping

import torch

from codegen.gpu import choice

Run = Callable[[], object]
# Replays of one turn take about this long; turns of different runs alternate.
_TURN_S = 0.01


def times(runs: Mapping[str, Run], device: str, turns: int = 7) -> dict[str, list[float]]:
    """Return seconds a call of several functions, a figure for each turn; turns alternate.

    On a GPU each is recorded once; a small one finds its operands in the L2 cache, as it would
    behind the layer that wrote them.
    """
    if device == "cpu":
        return {name: [_clock(run) for _ in range(turns)] for name, run in runs.items()}
    recorded = {name: choice.replayed(run) for name, run in runs.items()}
    repeats = {name: max(1, round(_TURN_S / max(_events(run, 3), 1e-7))) for name, run in
               recorded.items()}  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in recorded.items():
            seconds[name].append(_events(run, min(repeats[name], 2000)))
    return seconds


def step_times(steps: Mapping[str, Run], device: str, turns: int, repeat: int) -> dict[str, float]:
    """Return the median seconds of whole training steps, host included; turns alternate."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(turns):
        for name, step in steps.items():
            _synchronize(device)
            start = time.perf_counter()
            for _ in range(repeat):
                step()
            _synchronize(device)
            seconds[name].append((time.perf_counter() - start) / repeat)
    return {name: statistics.median(values) for name, values in seconds.items()}


def kernels(step: Run, count: int = 24) -> dict[str, float]:
    """Return seconds a step of the kernels that take longest, by their names' beginnings."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(2):
            step()
        torch.cuda.synchronize()
    seconds: Counter[str] = Counter()
    for event in seen.key_averages():
        seconds[event.key[:80]] += event.self_device_time_total / 2e6
    return dict(seconds.most_common(count))


def host_s(run: Run, calls: int = 300) -> float:
    """Return what the host takes for a call of something small."""
    for _ in range(10):
        run()
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def bandwidth_bytes_per_s() -> float:
    """Return what a copy of 4 GiB reaches, bytes read and written counted."""
    source = torch.empty(1 << 30, device="cuda").normal_()
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / _events(lambda: target.copy_(source), 10)


def peak_flops_per_s(dtype: torch.dtype) -> float:
    """Return what a product of two 8192 x 8192 matrices of random numbers reaches."""
    left, right = (torch.randn(8192, 8192, device="cuda") for _ in range(2))
    if dtype is torch.int8:
        left, right = ((x * 40).to(torch.int8) for x in (left, right))
        right = right.t().contiguous().t()
    else:
        left, right = left.to(dtype), right.to(dtype)
    product = torch._int_mm if dtype is torch.int8 else torch.mm
    for _ in range(3):
        product(left, right)
    return 2 * 8192**3 / _events(lambda: product(left, right), 10)


def _events(run: Run, count: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / count


def _clock(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
