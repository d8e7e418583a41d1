"""Whole trainings as processes, several at once: what benchmarks of accuracy share.

A training is one of the examples with arguments. It writes its results after every epoch, so that
of one that is stopped at the limit of time, or fails, the epochs so far are kept. Trainings of one
kind compile the same code: the others wait until the first has, and find it in the caches.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_POLL_S = 0.1

Runs = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Training:
    """One training.

    Attributes:
        name: of its results.
        arguments: of the example.
        kind: what it compiles; "" if no other training compiles the same.
        program: module of the example.
    """

    name: str
    arguments: tuple[str, ...]
    kind: str = ""
    program: str = "examples.cifar10"


class Process:
    """A training that has been started."""

    def __init__(self, training: Training, threads: int) -> None:
        """Start it.

        Args:
            training: what to run.
            threads: threads that it computes on.
        """
        self.training = training
        self._folder = tempfile.TemporaryDirectory(prefix="graphpass-training-")
        self._files = Path(self._folder.name)
        self._results = self._files / "json"
        self._start = time.monotonic()
        self._seen, self._stopped = 0, False
        command = [
            sys.executable, "-m", training.program, *training.arguments,
            "--threads", str(threads), "--json", str(self._results),
        ]  # fmt: skip
        with (self._files / "out").open("wb") as out:
            # A group of its own, to be ended with whatever compiles for it, but of this session:
            # whoever pauses the session pauses the trainings.
            self._process = subprocess.Popen(
                command, stdout=out, stderr=out, env=_environment(threads), process_group=0
            )

    @property
    def begun(self) -> bool:
        """Whether an epoch is over, and everything compiled."""
        return self._results.exists()

    def news(self) -> dict[str, Any] | None:
        """Return what it has so far, if an epoch ended since this was asked last."""
        if not self.begun or self._results.stat().st_mtime_ns == self._seen:
            return None
        self._seen = self._results.stat().st_mtime_ns
        return self._record(finished=False, failed="")

    def stop(self) -> None:
        """End it, if it still runs."""
        self._stopped = True
        # Nobody else waits for it, so that the group is there until `result` was asked for.
        os.killpg(self._process.pid, signal.SIGKILL)

    def result(self) -> dict[str, Any] | None:
        """Return what it came to; None while it runs."""
        pid, status, used = os.wait4(self._process.pid, 0 if self._stopped else os.WNOHANG)
        if not pid:
            return None
        self._process.returncode = os.waitstatus_to_exitcode(status)
        killed = self._stopped and os.WIFSIGNALED(status)
        failed = "" if status == 0 or killed else "\n".join(self._printed()[-30:])
        record = self._record(finished=status == 0, failed=failed) | {
            "cpu_s": used.ru_utime + used.ru_stime,
            # Linux counts it in KiB.
            "peak_memory_bytes": used.ru_maxrss * 1024,
        }
        self._folder.cleanup()
        return record

    def _record(self, finished: bool, failed: str) -> dict[str, Any]:
        content = json.loads(self._results.read_text(encoding="utf-8")) if self.begun else {}
        printed = self._printed()
        return {
            "arguments": list(self.training.arguments),
            "finished": finished,
            "failed": failed,
            "last_line": printed[-1] if printed else "",
            "wall_s": time.monotonic() - self._start,
            "environment": content.get("environment"),
            "products": _products(content),
            "flops_share": _flops_share(content.get("reports", [])),
            **(content["runs"][0] if content else {"epochs": []}),
        }

    def _printed(self) -> list[str]:
        text = (self._files / "out").read_text(encoding="utf-8", errors="replace")
        return [line for line in text.splitlines() if line.strip()]


def run(
    trainings: Sequence[Training],
    runs: Runs,
    note: Callable[[Runs], object],
    *,
    at_once: int = 1,
    seconds: float = math.inf,
    threads: int = 1,
) -> None:
    """Run trainings; those that `runs` holds finished are not run again.

    Args:
        trainings: what to run, in order of worth.
        runs: results by name, added to; `finished` says whether a run came to its end.
        note: called with them after every run, and after every epoch of one.
        at_once: how many processes run together.
        seconds: after which what still runs is ended, and nothing begun.
        threads: threads that each of them computes on.
    """
    until = time.monotonic() + seconds
    waiting = [t for t in trainings if not runs.get(t.name, {}).get("finished")]
    running: list[Process] = []
    compiled: set[str] = set()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            late = time.monotonic() > until
            for process in running if late else ():
                process.stop()
            for process in list(running):
                name = process.training.name
                compiled |= {process.training.kind} if process.begun else set()
                result = process.result()
                if result is not None:
                    running.remove(process)
                    _tell(name, result, until)
                if found := result or process.news():
                    runs[name] = found
                    note(runs)
            if late:
                break
            while len(running) < at_once and (ready := _ready(waiting, running, compiled)):
                waiting.remove(ready)
                running.append(Process(ready, threads))
            time.sleep(_POLL_S)
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in running:
            process.stop()
        for process in running:
            process.result()


def add_arguments(parser: ArgumentParser, output: str) -> None:
    """Add what says where, how many at once and for how long.

    Args:
        parser: of the benchmark's command line.
        output: name of its results file.
    """
    parser.add_argument("--data", type=Path, required=True, help="folder with the published files")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--threads", type=int, default=1, help="of each training")
    parser.add_argument("--at-once", type=int, default=1, help="trainings that run together")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end what still runs then")
    parser.add_argument("--output", default=output, help="name or path of the results, no suffix")


def _flops_share(reports: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of the exact FLOPs that a training does in its products."""
    rows = [row for report in reports for row in report["rows"]]
    exact = sum(row["exact_flops"] for row in rows)
    return sum(row["planned_flops"] for row in rows) / exact if exact else 1.0


def _ready(
    waiting: Sequence[Training], running: Sequence[Process], compiled: set[str]
) -> Training | None:
    """Return the first training that need not wait for another one to compile its code."""
    compiling = {process.training.kind for process in running} - compiled - {""}
    return next((training for training in waiting if training.kind not in compiling), None)


def _products(content: Mapping[str, Any]) -> dict[str, int]:
    """Return how many products each method computes: that what was asked for was done."""
    rows = [row for report in content.get("reports", ()) for row in report["rows"]]
    return dict(Counter(f"{row['method']} {row['gradient']}" for row in rows))


def _environment(threads: int) -> Mapping[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "TORCHINDUCTOR_COMPILE_THREADS": "2",
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
    }


def _tell(name: str, result: Mapping[str, Any], until: float) -> None:
    state = "done" if result["finished"] else "FAILED" if result["failed"] else "stopped"
    left = until - time.monotonic()
    clock = f"[{left:5.0f} s left] " if math.isfinite(left) else ""
    print(f"{clock}{name}: {state} in {result['wall_s']:.0f} s: {result['last_line']}", flush=True)
    if result["failed"]:
        print(result["failed"], flush=True)
