"""Peak memory of a training step, exact and under plans: what a step needs on top of the model.

    python -m benchmarks.step_memory
    python -m benchmarks.step_memory --models resnet18 --dtype bf16 --plans int8

Each model and plan is a process of its own, which compiles, trains some steps, and then sets back
the peak that Linux notes of it: what compilation took does not count. The figure is the peak of the
next steps less what the process holds between steps. The allocator gives freed memory back at once
(a low `MALLOC_MMAP_THRESHOLD_`), so that nothing is counted that no tensor holds.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.plans import MODELS, PLANS, options_of
from benchmarks.timing import write_results
from benchmarks.training_step import Case, make_step

EXACT = "inductor"
_STEPS = 3
# Larger tensors are mapped, and unmapped when they die.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": "0"}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write the results; or, with `--child`, be what is measured."""
    given = _parse(argv)
    if given.child:
        print(json.dumps(step_bytes(Case(given.models[0], given.dtype), given.child)))
        return
    table = Table(title=f"peak memory of a step above what stays, MB; {given.dtype}")
    for column in ("model", EXACT, *given.plans):
        table.add_column(column, justify="right")
    record: dict[str, dict[str, int]] = {}
    for name in given.models:
        peaks = {plan: _run_child(given, name, plan) for plan in (EXACT, *given.plans)}
        record[name] = peaks
        shares = (f"{peak / 1e6:.0f} ({peak / peaks[EXACT]:.2f})" for peak in peaks.values())
        table.add_row(name, *shares)
    Console().print(table)
    described = {"dtype": given.dtype, "peak_bytes": record}
    Console().print(f"written to {write_results(given.output, described)}")


def step_bytes(case: Case, plan: str) -> int:
    """Return the bytes that this process holds at the peak of a step, but not between steps.

    Args:
        case: what is trained.
        plan: one of `benchmarks.plans`, or Inductor alone.
    """
    step = make_step(case, None if plan == EXACT else options_of(case, PLANS[plan]))
    gc.collect()
    # Linux: 5 sets the peak back to what is held now.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status_bytes("VmRSS")
    for _ in range(_STEPS):
        step()
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return 1024 * int(value.split()[0])
    raise AssertionError(f"/proc/self/status has no {name}")


def _run_child(given: argparse.Namespace, model: str, plan: str) -> int:
    command = [
        sys.executable, "-m", "benchmarks.step_memory", "--child", plan, "--models", model,
        "--dtype", given.dtype,
    ]  # fmt: skip
    environment = {**os.environ, **_MALLOC}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(finished.stdout.split()[-1])


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_memory", description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--plans", nargs="+", default=("int8, forward too",), choices=tuple(PLANS))
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--output", default="step_memory", help="name of the results file")
    parser.add_argument("--child", choices=(EXACT, *PLANS), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
