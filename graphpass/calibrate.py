"""Measure this machine for the cost model: `python -m graphpass calibrate`.

Our own kernels are compiled first, so that no compiler runs while anything is measured. Everything
is measured in rounds, and the fastest figure counts: a disturbance seldom strikes every time.
"""

import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch._subclasses.fake_tensor import FakeTensorMode

from codegen import build
from graphpass import calibration, workloads
from graphpass.calibration import Measurement
from graphpass.timing import fastest, keep_memory
from graphpass.workloads import Make

_ROUNDS = 3
# Of the whole time, what a kernel is called again and again for.
_CALLS_S = 0.01


def calibrate(threads: int, limit_s: float, again: bool, console: Console) -> Path:
    """Measure, with a progress bar, and write what was found to the user's cache directory.

    Args:
        threads: threads of torch while it is measured.
        limit_s: when to stop; the first round is finished however long it takes.
        again: whether the faster figure counts where a kernel was measured in an earlier run, on a
            machine that has other things to do.
        console: where to draw.

    Returns:
        The file that was written.

    Raises:
        OSError: if it cannot be written.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    keep_memory()
    try:
        with torch.no_grad():
            best, disturbed = _measure(time.perf_counter() + limit_s, console)
    finally:
        torch.set_num_threads(before)
    if disturbed:
        console.print(
            f"other programs were running while {disturbed} of {len(best)} kernels were measured: "
            "run again with --again when the machine is idle"
        )
    earlier = calibration.measurements(threads) if again else ()
    for one in () if isinstance(earlier, str) else earlier:
        _keep_faster(best, one)
    return calibration.store(best.values(), threads)


def _measure(end: float, console: Console) -> tuple[dict[tuple[object, ...], Measurement], int]:
    """Return what was found, and of how many kernels every call was disturbed."""
    jobs = _jobs()
    best: dict[tuple[object, ...], Measurement] = {}
    calm: set[tuple[object, ...]] = set()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("compiling", total=(1 + _ROUNDS) * len(jobs) + _ROUNDS)
        for make in jobs:
            _compile(make)
            progress.advance(task)
        build.wait()
        fused = [load for dtype in workloads.DTYPES for load in workloads.fused(dtype)]
        jobs.append(lambda: fused)
        for number in range(_ROUNDS):
            for make in jobs:
                if number and time.perf_counter() > end:
                    break
                progress.update(task, description=f"measuring, round {number + 1}", advance=1)
                for load in make():
                    found = fastest(load.runs, _CALLS_S, load.before, least=1)
                    for kernel, seconds in zip(load.kernels, found.seconds, strict=True):
                        one = Measurement.of(kernel, seconds / load.count)
                        _keep_faster(best, one)
                        if not found.disturbed:
                            calm.add(one.identity)
    return best, len(best) - len(calm)


def _keep_faster(best: dict[tuple[object, ...], Measurement], one: Measurement) -> None:
    known = best.get(one.identity)
    if known is None or one.seconds < known.seconds:
        best[one.identity] = one


def _jobs() -> list[Make]:
    jobs: list[Make] = []
    for dtype in workloads.DTYPES:
        jobs.append(partial(workloads.moving, dtype))
        jobs += workloads.vendor(dtype)
        jobs += workloads.ours(dtype)
    return jobs


def _compile(make: Make) -> None:
    """Begin to compile our kernels: traced on fake tensors, a kernel is built and not run."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        make()
