"""Time of the first training step, compilation included, against Inductor: cold and warm caches.

    python -m benchmarks.compile_time           # writes results/compile_time.json
    python -m benchmarks.compile_time --plan "int8, forward too" --output compile_time_int8

Every figure is a fresh process. Cold: with empty caches. Warm: the same process again, which finds
the caches of the first. Turns alternate between the two backends.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console

from benchmarks.plans import PLANS, options_of
from benchmarks.timing import write_results
from benchmarks.training_step import Case
from examples.models import build

BACKENDS = ("inductor", "approx")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the ratios, write the results; or, with `--child`, be what is measured."""
    given = _parse(argv)
    if given.child:
        print(first_step_s(given))
        return
    seconds: dict[str, dict[str, list[float]]] = {
        backend: {"cold": [], "warm": []} for backend in BACKENDS
    }
    for _ in range(given.rounds):
        for backend in BACKENDS:
            with tempfile.TemporaryDirectory() as folder:
                for state in ("cold", "warm"):
                    seconds[backend][state].append(_run_child(backend, Path(folder), given))
    record: dict[str, Any] = {"model": given.model, "options": _options(given), "seconds": seconds}
    for state in ("cold", "warm"):
        medians = {b: statistics.median(seconds[b][state]) for b in BACKENDS}
        record[f"{state}_ratio"] = medians["approx"] / medians["inductor"]
        Console().print(
            f"{state}: inductor {medians['inductor']:.2f} s, approx {medians['approx']:.2f} s, "
            f"ratio {record[f'{state}_ratio']:.2f}"
        )
    Console().print(f"written to {write_results(given.output, record)}")


def first_step_s(given: argparse.Namespace) -> float:
    """Return the seconds of the first training step of this process."""
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model = build(given.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    options = _options(given) if given.child == "approx" else None
    compiled = torch.compile(model, backend=given.child, options=options)
    images = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (128,))
    start = time.perf_counter()
    F.cross_entropy(compiled(images), labels).backward()
    return time.perf_counter() - start


def _options(given: argparse.Namespace) -> dict[str, Any]:
    if given.plan is not None:
        return options_of(Case(given.model), PLANS[given.plan])
    return {"methods": {"layer*.conv*": given.method}, "schedule": given.schedule, "strict": True}


def _run_child(backend: str, folder: Path, given: argparse.Namespace) -> float:
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "GRAPHPASS_CACHE_DIR": str(folder / "graphpass"),
    }
    command = [
        sys.executable, "-m", "benchmarks.compile_time", "--child", backend,
        "--model", given.model, "--method", given.method, "--schedule", given.schedule,
        "--threads", str(given.threads),
    ]  # fmt: skip
    if given.plan is not None:
        command += ["--plan", given.plan]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(finished.stdout.split()[-1])


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_time", description=__doc__)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--method", default="zero")
    parser.add_argument("--schedule", default="ga-1")
    parser.add_argument("--plan", choices=tuple(PLANS), help="instead of method and schedule")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default="compile_time", help="name of the results file")
    parser.add_argument("--child", choices=BACKENDS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
