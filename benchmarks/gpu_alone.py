"""One at a time on the GPU: whoever times has the other processes of `benchmarks.gpu` stopped.

They are sessions of processes, each with a file named after it in the folder that an environment
variable names. What a stopped process has launched runs to its end first.
"""

import fcntl
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import torch

from codegen.gpu import choice

FOLDER = "GRAPHPASS_GPU_PROCESSES"
# What others launched before they were stopped ends within this.
_WAIT_S = 0.05
_DEPTH = [0]


def note(session: int) -> Path:
    """Return the file that says that a session can be stopped."""
    return Path(os.environ[FOLDER], f"{session}.session")


def signal_others(number: int) -> None:
    """Send a signal to all sessions but this one."""
    files = Path(os.environ[FOLDER]).glob("*.session") if FOLDER in os.environ else ()
    signal_sessions({int(path.stem) for path in files} - {os.getsid(0)}, number)


def signal_sessions(sessions: set[int], number: int) -> None:
    """Send a signal to every process of some sessions, whatever group it has made for itself."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(path.name)) in sessions:
                os.kill(int(path.name), number)
        except ProcessLookupError:
            continue


@contextmanager
def alone() -> Iterator[None]:
    """Stop the other processes meanwhile; inside itself, do nothing."""
    if _DEPTH[0] or FOLDER not in os.environ:
        yield
        return
    with (Path(os.environ[FOLDER]) / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _DEPTH[0] += 1
        try:
            signal_others(signal.SIGSTOP)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                time.sleep(_WAIT_S)
            yield
        finally:
            signal_others(signal.SIGCONT)
            _DEPTH[0] -= 1


@contextmanager
def choosing_alone() -> Iterator[None]:
    """Have ways to compute the same timed alone too, all of one kernel in one go, but not compiled.

    On an H200 every way of every kernel had the others stopped for itself: most of five minutes.
    """
    timed, chosen = choice.turns, choice.fastest

    def turns(run: choice.Run, calls: int) -> float:
        with alone():
            return timed(run, calls)

    def fastest(
        path: Path, ways: Mapping[str, choice.Run], machine: str, timer: choice.Timer
    ) -> choice.Outcome:
        if (known := choice.remembered(path, ways, machine)) is not None:
            return known
        for run in ways.values():
            # What fails will do so again, and be written down then.
            with suppress(Exception):
                run()
        with alone():
            return chosen(path, ways, machine, timer)

    with mock.patch.object(choice, "turns", turns), mock.patch.object(choice, "fastest", fastest):
        yield
