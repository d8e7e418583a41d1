"""How things are timed here: in turns, many times, as ratios; on a machine that is described."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.results import environment
from graphpass.timing import keep_memory

RESULTS = Path(__file__).parent / "results"


def interleave(
    runs: Mapping[str, Callable[[], object]], rounds: int, repeat: int
) -> dict[str, list[float]]:
    """Time several functions in turns, so that a slow moment of the machine hits all of them.

    Args:
        runs: what is timed, by name; each has been called before.
        rounds: number of turns.
        repeat: calls in a row in each turn.

    Returns:
        Seconds a call: one figure for each turn.
    """
    keep_memory()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(repeat):
                run()
            seconds[name].append((time.perf_counter() - start) / repeat)
    return seconds


def paired(
    base: Callable[[], object], runs: Mapping[str, Callable[[], object]], rounds: int, repeat: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Time several functions, each turn of one between two turns of what it is compared with.

    The first call of a turn is not timed: it finds the caches full of what ran before.

    Args:
        base: what everything is compared with.
        runs: what is timed, by name; each has been called before.
        rounds: turns of each.
        repeat: timed calls in a row in each turn.

    Returns:
        Seconds a call of every turn, and those of the base around it, by name.
    """

    def turn(run: Callable[[], object]) -> float:
        run()
        start = time.perf_counter()
        for _ in range(repeat):
            run()
        return (time.perf_counter() - start) / repeat

    keep_memory()
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    before = turn(base)
    for _ in range(rounds):
        for name, run in runs.items():
            mine, after = turn(run), turn(base)
            seconds[name][0].append(mine)
            seconds[name][1].append((before + after) / 2)
            before = after
    return seconds


def ratio(seconds: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles of the ratio of two series, turn by turn."""
    ratios = [mine / other for mine, other in zip(seconds, base, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {"median": statistics.median(ratios), "low_quartile": low, "high_quartile": high}


def gate() -> None:
    """Run the contract tests first: no figure is printed of something that computes nonsense.

    Raises:
        SystemExit: if a test fails.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/contract"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        sys.stderr.write(finished.stdout)
        raise SystemExit("the contract tests fail: nothing is measured")


def earlier_runs(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `runs` that a results file holds, if they were made with the same settings."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return {}
    record = json.loads(path.read_text())
    same = all(record.get(key) == value for key, value in settings.items())
    return dict(record["runs"]) if same else {}


def write_results(name: str, record: Mapping[str, Any]) -> Path:
    """Write measurements with machine, versions, commit and date to `results/<name>.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    described = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "environment": environment(),
        **record,
    }
    path.write_text(json.dumps(described, indent=1) + "\n")
    return path


def read_results(name: str) -> dict[str, Any]:
    """Return what `write_results` wrote under a name."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    return finished.stdout.strip() or "unknown"
