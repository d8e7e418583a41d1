"""What a run leaves behind: its epochs, statistics of its steps, the machine it ran on."""

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True, slots=True)
class Epoch:
    """One pass over the training data, or the part of one that a step limit left.

    Attributes:
        epoch: Number of the epoch, from 1.
        steps: Training steps in it.
        train_loss: Mean loss of its batches; None if that is not finite.
        score: Figure of merit on the test split, after it.
        train_s: Wall-clock of its training steps, without compilation and evaluation.
    """

    epoch: int
    steps: int
    train_loss: float | None
    score: float
    train_s: float

    def __str__(self) -> str:
        """Return the line printed when the epoch is over."""
        loss = "not finite" if self.train_loss is None else f"{self.train_loss:.4f}"
        return f"epoch {self.epoch:3d}   loss {loss}   test {self.score:.2f}   {self.train_s:.1f} s"

    def to_dict(self, score_name: str) -> dict[str, Any]:
        """Return the record for JSON, with `score` under the name it has in its task."""
        record = asdict(self)
        record[score_name] = record.pop("score")
        return record


class StepTime(NamedTuple):
    """Wall-clock of one training step.

    Attributes:
        seconds: Data, forward and backward pass, update.
        compiled: Whether code was compiled in it; also true of a process's first step, in which
            libraries set themselves up.
    """

    seconds: float
    compiled: bool


def without_compilation(steps: Sequence[StepTime]) -> list[float]:
    """Return the seconds of each step, with the median of the others in place of compiling ones.

    Args:
        steps: All steps of a process, in order.

    Returns:
        As many seconds; those of compiling steps are 0 if there are no others.
    """
    others = [step.seconds for step in steps if not step.compiled]
    usual = statistics.median(others) if others else 0.0
    return [usual if step.compiled else step.seconds for step in steps]


def step_statistics(steps: Sequence[StepTime]) -> dict[str, float | int | None]:
    """Return the statistics of a process's training steps.

    Returns:
        `steps`; `train_s`, as if nothing had been compiled, and `compile_s`, the rest; and of the
        steps that did not compile `median_step_s` and `mean_step_s`, None if there are none.
    """
    train_s = sum(without_compilation(steps))
    others = [step.seconds for step in steps if not step.compiled]
    return {
        "steps": len(steps),
        "compile_s": max(0.0, sum(step.seconds for step in steps) - train_s),
        "train_s": train_s,
        "median_step_s": statistics.median(others) if others else None,
        "mean_step_s": statistics.fmean(others) if others else None,
    }


def environment() -> dict[str, Any]:
    """Return machine and versions, without which seconds mean little."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        # Only of a process that has used it: asking would take memory there.
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "graphpass": _version("graphpass"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
