"""What a run leaves behind: its epochs, statistics of its steps, the machine it ran on."""

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def without_compilation(step_s: Sequence[float]) -> list[float]:
    """Replace the first step, in which the model was compiled, by the median of the others.

    Args:
        step_s: Seconds of each step of a process.

    Returns:
        As many seconds; 0 for the first if there is no other.
    """
    others = list(step_s[1:])
    return [statistics.median(others) if others else 0.0, *others] if step_s else []


def step_statistics(step_s: Sequence[float]) -> dict[str, float | int | None]:
    """Return the statistics of a process's training steps, of which the first one compiled.

    Returns:
        `steps`, `compile_s` (the first step less a usual one) and `train_s`; `median_step_s` and
        `mean_step_s` of all but the first step, None if there is no other.
    """
    trained = without_compilation(step_s)
    others = trained[1:]
    return {
        "steps": len(step_s),
        "compile_s": max(0.0, step_s[0] - trained[0]) if step_s else 0.0,
        "train_s": sum(trained),
        "median_step_s": statistics.median(others) if others else None,
        "mean_step_s": statistics.fmean(others) if others else None,
    }


def summary(
    epochs: Sequence[Epoch], step_s: Sequence[float], first_epoch: int = 0
) -> dict[str, Any]:
    """PLACEHOLDER."""


def environment() -> dict[str, Any]:
    """Return machine and versions, without which seconds mean little."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
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
