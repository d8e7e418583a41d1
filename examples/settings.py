"""How a run trains: validated once, read by the training loop and written into the results."""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from graphpass.errors import ConfigError

# Part of the run over which the learning rate rises; every schedule but "constant" starts so.
WARMUP_FRACTION = 0.05
BACKENDS = ("approx", "inductor", "eager")
DTYPES = ("fp32", "bf16")

# Factor of the learning rate, given the fraction of the run that is over.
LR_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda fraction: 1 - fraction,
    "cosine": lambda fraction: (1 + math.cos(math.pi * fraction)) / 2,
    "exponential": lambda fraction: 0.01**fraction,
    "constant": lambda fraction: 1.0,
    # Zaremba et al. 2014, medium LSTM: constant for 6 of 39 epochs, then 0.8 an epoch.
    "late": lambda fraction: min(1.0, 0.8 ** (39 * fraction - 6)),
}


def _sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)


def _plain_sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0, fused=True)


def _adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.001, fused=True)


# Each with the learning rate that is customary for it. "fused" is one kernel for all parameters:
# the update would otherwise be a visible part of the step in deep, narrow networks.
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "sgd-plain": _plain_sgd,
    "adam": _adam,
}


@dataclass(frozen=True, slots=True)
class Settings:
    """How to train.

    Attributes:
        epochs: Length of the run, over which the learning rate decays.
        batch_size: Samples in a batch.
        optimizer: A key of `OPTIMIZERS`.
        lr: Highest learning rate; None for the optimizer's customary one.
        lr_schedule: A key of `LR_DECAYS`.
        backend: One of `BACKENDS`; "eager" does not compile.
        options: What `torch.compile(backend="approx")` is given.
        seed: Of initial values, data order and approximations.
        dtype: "bf16" runs the forward pass under autocast.
        channels_last: Memory format of model and images.
        max_steps: Stop after so many steps of the run, whose schedule stays; None for its end.
        device: Where model and data are, such as "cpu" or "cuda"; batches are drawn alike on all.
    """

    epochs: int = 10
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float | None = None
    lr_schedule: str = "linear"
    backend: str = "approx"
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    dtype: str = "fp32"
    channels_last: bool = False
    max_steps: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ConfigError: If a value is not legal.
        """
        _check_name("optimizer", self.optimizer, OPTIMIZERS)
        _check_name("lr_schedule", self.lr_schedule, LR_DECAYS)
        _check_name("backend", self.backend, BACKENDS)
        _check_name("dtype", self.dtype, DTYPES)
        for name in ("epochs", "batch_size", "max_steps"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigError(f"{name} is {number}: give a number of at least 1")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ConfigError(f"lr is {self.lr}: give a positive number")
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed is {self.seed}: give a number from 0 to {2**31 - 1}")
        _check_device(self.device)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer, its learning rate not yet scaled by `lr_factor`."""
        optimizer = OPTIMIZERS[self.optimizer](model.parameters())
        if self.lr is not None:
            optimizer.param_groups[0]["lr"] = self.lr
        return optimizer

    def lr_factor(self, step: int, total_steps: int) -> float:
        """Return what to multiply the highest learning rate by on `step`, counted from 0."""
        factor = LR_DECAYS[self.lr_schedule](min(step / total_steps, 1.0))
        if self.lr_schedule == "constant":
            return factor
        rising_steps = max(1, round(WARMUP_FRACTION * total_steps))
        return min(factor, (step + 1) / rising_steps)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which the model is called."""
        if self.dtype == "bf16":
            return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16)
        return contextlib.nullcontext()


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"there is no device {name!r}: legal are cpu, cuda, cuda:0, ..."
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"cannot train on {name!r}: legal are cpu, cuda, cuda:0, ...")
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= there:
        raise ConfigError(f"there is no device {name!r}: torch sees {there} GPUs on this machine")


def _check_name(what: str, given: str, legal: Iterable[str]) -> None:
    if given not in (names := list(legal)):
        raise ConfigError(f"unknown {what} {given!r}: legal are {', '.join(names)}")
