"""One at a time on the GPU: whoever times has the other processes of `benchmarks.gpu` stopped.

They are groups of processes, each with a file named after it in the folder that an environment
variable names. What a stopped process has launched runs to its end first.
"""

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from codegen.gpu import choice

FOLDER = "GRAPHPASS_GPU_PROCESSES"
# What others launched before they were stopped ends within this.
_WAIT_S = 0.15
_DEPTH = [0]


def signal_others(number: int) -> None:
    """Send a signal to all other groups of processes."""
    for path in Path(os.environ[FOLDER]).glob("*.group") if FOLDER in os.environ else ():
        if int(path.stem) != os.getpgrp():
            try:
                os.killpg(int(path.stem), number)
            except ProcessLookupError:
                path.unlink(missing_ok=True)


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
    """Have ways to compute the same timed alone too, but not compiled."""
    timed = choice.turns

    def turns(run: choice.Run, calls: int) -> float:
        with alone():
            return timed(run, calls)

    with mock.patch.object(choice, "turns", turns):
        yield
