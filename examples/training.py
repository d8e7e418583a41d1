"""The training loop that the examples share: a task, a run with all its state, and the loop.

A run is deterministic for a given seed and number of threads, and continues bit for bit from a
checkpoint. The model is evaluated through the module that was not compiled: it shares the
parameters, and an ordinary pass over the test split costs less than compiling a graph for it.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import graphpass
from examples import checkpoint, results
from examples.settings import Settings
from graphpass.backend import approx
from graphpass.errors import ConfigError
from graphpass.sparse import leaves_weights_out

# How far the host may be ahead of a GPU.
_STEPS_AHEAD = 32

Batch = tuple[Tensor, Tensor]
Forward = Callable[[Tensor], Tensor]


class BatchStream(Protocol):
    """An endless stream of training batches whose state can be saved."""

    per_epoch: int

    def next(self) -> Batch:
        """Return the next batch."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the stream."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""


@dataclass(frozen=True, slots=True)
class Task:
    """What to train.

    Attributes:
        name: Data set and model; a checkpoint belongs to one.
        model: The module, trained in place.
        batches: Training data.
        loss: Scalar loss of a batch, given the compiled model.
        score: Figure of merit on the test split, given the module in eval mode.
        score_name: What the results call that figure, with its unit.
        max_gradient_norm: Norm at which the gradient of all parameters is clipped; None for none.
    """

    name: str
    model: nn.Module
    batches: BatchStream
    loss: Callable[[Forward, Batch], Tensor]
    score: Callable[[nn.Module], float]
    score_name: str
    max_gradient_norm: float | None = None


class Trainer:
    """One training run: the compiled step, and all the state that a checkpoint holds."""

    def __init__(self, task: Task, settings: Settings) -> None:
        """Start at step 0; nothing is compiled before the first step."""
        self.task = task
        self.settings = settings
        self.compiled = _compile(task.model, settings)
        self.optimizer = settings.make_optimizer(task.model)
        self.total_steps = settings.epochs * task.batches.per_epoch
        self.last_step = min(self.total_steps, settings.max_steps or self.total_steps)
        self.step = 0
        self.history: list[results.Epoch] = []
        # The steps of this process; a resumed run has made others before.
        self.times: list[results.StepTime] = []
        self._highest_lr = self.optimizer.param_groups[0]["lr"]
        self._device = torch.device(settings.device)
        self._epoch_loss = torch.zeros((), dtype=torch.float64, device=self._device)
        self._epoch_first = 0
        self._epoch_earlier_s = 0.0

    @property
    def done(self) -> bool:
        """Whether the run has reached its last step."""
        return self.step >= self.last_step

    @property
    def between_epochs(self) -> bool:
        """Whether the last step was the last one of an epoch."""
        return self.step % self.task.batches.per_epoch == 0

    def train_step(self) -> None:
        """Train on the next batch: data, forward and backward pass, update.

        Raises:
            ConfigError: If the backend refuses its options, which it reads on the first step.
        """
        start, compilations = time.perf_counter(), _compilations()
        batch = self.task.batches.next()
        lr = self._highest_lr * self.settings.lr_factor(self.step, self.total_steps)
        self.optimizer.param_groups[0]["lr"] = lr
        with _config_errors_unwrapped():
            with self.settings.autocast():
                loss = self.task.loss(self.compiled, batch)
            self.optimizer.zero_grad()
            loss.backward()
        if self.task.max_gradient_norm is not None:
            parameters = self.task.model.parameters()
            nn.utils.clip_grad_norm_(parameters, self.task.max_gradient_norm)
        self.optimizer.step()
        self._epoch_loss += loss.detach()
        self.step += 1
        if self._on_gpu and (self.step % _STEPS_AHEAD == 0 or self.between_epochs or self.done):
            # So that seconds add up to those of the work, not of handing it over. To wait in every
            # step would be a visible part of small ones, most of all where processes share a GPU.
            torch.cuda.synchronize(self._device)
        # Variants of a schedule may be compiled when they are first needed, not on the first step.
        compiled = not self.times or _compilations() != compilations
        self.times.append(results.StepTime(time.perf_counter() - start, compiled))

    def end_epoch(self) -> results.Epoch:
        """Evaluate, and add the epoch (or the part of it that was trained) to `history`."""
        steps = (self.step - 1) % self.task.batches.per_epoch + 1
        loss = self._epoch_loss.item() / steps
        record = results.Epoch(
            epoch=len(self.history) + 1,
            steps=steps,
            train_loss=loss if math.isfinite(loss) else None,
            score=self._score(),
            train_s=self._epoch_s(),
        )
        self.history.append(record)
        self._epoch_loss.zero_()
        self._epoch_first, self._epoch_earlier_s = len(self.times), 0.0
        return record

    def summary(self) -> dict[str, Any]:
        """Return the results of the run so far; seconds are those of this process."""
        last = self.history[-1] if self.history else None
        return {
            "backend": self.settings.backend,
            "options": dict(self.settings.options),
            self.task.score_name: None if last is None else last.score,
            "train_loss": None if last is None else last.train_loss,
            **results.step_statistics(self.times),
            "epochs": [record.to_dict(self.task.score_name) for record in self.history],
        }

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on."""
        session = self._session()
        return {
            "run": self._identity(),
            "step": self.step,
            "model": self.task.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.task.batches.state_dict(),
            "rng": torch.get_rng_state(),
            "gpu_rng": torch.cuda.get_rng_state(self._device) if self._on_gpu else None,
            "session": None if session is None else session.state_dict(),
            "history": [asdict(record) for record in self.history],
            "epoch_loss": self._epoch_loss.item(),
            "epoch_s": self._epoch_s(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the run that `state` was taken from, possibly with another backend.

        Raises:
            ConfigError: If it was taken from a run of another task, batch size or optimizer.
        """
        for name, here in self._identity().items():
            if (there := state.get("run", {}).get(name)) != here:
                raise ConfigError(f"its {name} is {there}, that of this run is {here}")
        try:
            self._restore(state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ConfigError(f"it does not fit this run: {error}") from error

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.task.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.task.batches.load_state_dict(state["batches"])
        self.history = [results.Epoch(**record) for record in state["history"]]
        self.step = state["step"]
        self._epoch_loss.fill_(state["epoch_loss"])
        self._epoch_earlier_s = state["epoch_s"]
        session = self._session()
        if session is not None and state["session"] is not None:
            session.load_state_dict(state["session"])
        torch.set_rng_state(state["rng"])
        if self._on_gpu and state["gpu_rng"] is not None:
            torch.cuda.set_rng_state(state["gpu_rng"], self._device)

    def _score(self) -> float:
        self.task.model.eval()
        with torch.no_grad(), self.settings.autocast(), self._trained_weights():
            score = self.task.score(self.task.model)
        self.task.model.train()
        return score

    def _trained_weights(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the model has the weights that training computes with."""
        if self.settings.backend == "approx" and leaves_weights_out(self.compiled):
            return graphpass.sparse_weights(self.compiled)
        return contextlib.nullcontext()

    def _epoch_s(self) -> float:
        here_s = results.without_compilation(self.times)[self._epoch_first :]
        return self._epoch_earlier_s + sum(here_s)

    def _identity(self) -> dict[str, str | int]:
        batch_size, optimizer = self.settings.batch_size, self.settings.optimizer
        return {"task": self.task.name, "batch size": batch_size, "optimizer": optimizer}

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    def _session(self) -> Any:
        if self.settings.backend != "approx":
            return None
        return graphpass.session(self.compiled)


def fit(
    trainer: Trainer,
    console: Console,
    save_to: Path | None = None,
    after_first_step: Callable[[], None] = lambda: None,
    after_epoch: Callable[[], object] = lambda: None,
) -> None:
    """Train to the last step; save a checkpoint after every epoch and at the end.

    Raises:
        ConfigError: If the backend refuses its options.
    """
    with Progress(console=console, disable=not console.is_terminal, refresh_per_second=2) as bar:
        line = bar.add_task(trainer.settings.backend, total=trainer.last_step)
        while not trainer.done:
            trainer.train_step()
            bar.update(line, completed=trainer.step)
            if len(trainer.times) == 1:
                after_first_step()
            # A run that stops inside an epoch is saved before the epoch is closed: whoever resumes
            # it goes on with the epoch.
            if save_to is not None and trainer.done and not trainer.between_epochs:
                checkpoint.save(save_to, trainer.state_dict())
            if trainer.done or trainer.between_epochs:
                console.print(str(trainer.end_epoch()), highlight=False)
                after_epoch()
            if save_to is not None and trainer.between_epochs:
                checkpoint.save(save_to, trainer.state_dict())


def resume(trainer: Trainer, path: Path) -> None:
    """Continue from a checkpoint file.

    Raises:
        ConfigError: If the file is missing, damaged, or of a run that differs from this one.
    """
    state = checkpoint.load(path)
    try:
        trainer.load_state_dict(state)
    except ConfigError as error:
        raise ConfigError(
            f"cannot resume from {path}: {error}; give the arguments of the run that wrote it"
        ) from error


def _compile(model: nn.Module, settings: Settings) -> nn.Module:
    if settings.backend == "eager":
        return model
    if settings.backend == "inductor":
        compiled = torch.compile(model, backend="inductor")
    else:
        # By its name, "approx", once the project is installed; like this in a mere clone as well.
        compiled = torch.compile(model, backend=approx, options=dict(settings.options))
    # A module like the one it wraps; torch declares a callable.
    return cast(nn.Module, compiled)


def _compilations() -> int:
    """Return a number that grows whenever Dynamo or Inductor compiles."""
    return sum(sum(group.values()) for group in counters.values())


@contextlib.contextmanager
def _config_errors_unwrapped() -> Iterator[None]:
    """Raise a `ConfigError` of a backend as it was, without what Dynamo makes of it.

    Raises:
        ConfigError: If a backend raised it.
        BackendCompilerFailed: As Dynamo raised it, for any other failure.
    """
    try:
        yield
    except BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, ConfigError):
            raise
        raise ConfigError(str(error.inner_exception)) from error
    except ConfigError as error:
        # Dynamo appends a paragraph of advice for people who debug Dynamo.
        raise ConfigError(str(error).partition("\n\n")[0]) from error
