"""The run-time state of a model's approximate training: which step it is, and what follows.

A step is counted by default for every training forward of the model, however many graphs it was
broken into. Where that is not an optimizer step (gradient accumulation, several forwards a step),
call `advance` once per optimizer step, or let `follow(optimizer)` do it.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from codegen import draws
from graphpass.budget import Budget, check_budget
from graphpass.errors import ConfigError
from graphpass.keeping import Kept, settle
from graphpass.measuring import Measured, joined
from graphpass.plan import Plan

_STATE_VERSION = 1


class Turn(NamedTuple):
    """One call of one graph.

    Attributes:
        step: the step it belongs to.
        repeat: how often the caller was seen in this step before.
        caller: number of the caller.
    """

    step: int
    repeat: int
    caller: int

    def seed(self, given: int) -> int:
        """Return the seed of its draws.

        Args:
            given: the user's seed.
        """
        return draws.mix(given, self.step, self.repeat, self.caller)


class Steered(Protocol):
    """What keeps the plan of a graph within its budget, as far as a session knows it."""

    measured: Measured | None
    note: str
    is_halted: bool

    def budget_changed(self) -> None:
        """Plan again."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a later run needs."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        ...


class Session:
    """State of one model: steps, exact sections, the plans of its graphs and their noise."""

    def __init__(self) -> None:
        """Start at step 0, counting every training forward."""
        self._step = 0
        self._counts_forwards = True
        self._exact_depth = 0
        # How often each caller (`Caller.identity`) was seen in this step; none that was not.
        self._calls: dict[str, int] = {}
        # Callers in the order they first ran; gives each its own draws, the same in every run.
        self._callers: dict[str, int] = {}
        self._resumed_calls: list[int] = []
        # By `Owner.identity`, in the order of the forward pass.
        self._layers: dict[str, tuple[int, int]] = {}
        self._plans: dict[str, Plan] = {}
        # By caller, in the order they were compiled; and why others are not measured.
        self._controllers: dict[str, Steered] = {}
        self._unmeasured: dict[str, str] = {}
        # By caller, what looks for something to steer again, under another budget.
        self._again: dict[str, Callable[[], None]] = {}
        self._resumed_controllers: list[Mapping[str, Any]] = []
        # What methods keep, by caller, in the order they were compiled.
        self._kept: dict[str, Kept] = {}
        self._resumed_kept: list[Mapping[str, torch.Tensor]] = []
        self._budget: Budget | None = None
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._highest_rate = 0.0

    @property
    def step(self) -> int:
        """Number of training steps begun (by default rule) or completed (with `advance`)."""
        begun = self._counts_forwards and bool(self._calls)
        return self._step + begun

    @property
    def plan(self) -> Plan:
        """The plan of every graph compiled so far, in one."""
        return Plan.joined(list(self._plans.values()))

    @property
    def is_exact(self) -> bool:
        """Whether an `exact` section is open."""
        return self._exact_depth > 0

    @property
    def noise(self) -> Measured | None:
        """What was measured last, over all graphs; None before the first measurement."""
        found = [c.measured for c in self._controllers.values() if c.measured is not None]
        return joined(found)

    @property
    def notes(self) -> tuple[str, ...]:
        """Why a graph is not measured, or why its plan was given up."""
        notes = [*self._unmeasured.values(), *(c.note for c in self._controllers.values())]
        return tuple(dict.fromkeys(note for note in notes if note))

    def set_budget(self, budget: Budget) -> None:
        """Plan for another budget, by what is known of the noise, or is measured then.

        Where nothing was worth measuring under the budget of before, it is looked at again.

        Raises:
            ConfigError: if it is no budget, is out of reach, or no plan of this model is made by
                the planner, or none is any more after a failure.
        """
        check_budget(budget)
        before, self._budget = self._budget, budget
        try:
            for again in list(self._again.values()):
                again()
            left = any(not c.is_halted for c in self._controllers.values())
            if self._plans and not self._again and not left:
                raise ConfigError(
                    f"set_budget({budget!r}): no plan of this model is made by the planner "
                    f"({'; '.join(self.notes)}); compile it with options={{'budget': ...}} alone"
                )
        except ConfigError:
            self._budget = before
            raise
        for controller in self._controllers.values():
            controller.budget_changed()

    def budget(self, given: Budget) -> Budget:
        """Return the budget as set here, or else the one given."""
        return given if self._budget is None else self._budget

    def decay(self, wanted: bool) -> float:
        """Return by what a budget falls: learning rate over the largest so far; 1 if not wanted."""
        optimizer = None if self._optimizer is None else self._optimizer()
        if not wanted or optimizer is None:
            return 1.0
        rate = max((float(group["lr"]) for group in optimizer.param_groups), default=0.0)
        self._highest_rate = max(self._highest_rate, rate)
        return rate / self._highest_rate if self._highest_rate else 1.0

    def advance(self) -> None:
        """Count one optimizer step; from the first call on, forwards are not counted any more."""
        self._counts_forwards = False
        self._step += 1
        self._calls.clear()

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Count a step whenever `optimizer` takes one, instead of every forward.

        Args:
            optimizer: the optimizer of the model's parameters.
        """
        self._counts_forwards = False
        self._optimizer = weakref.ref(optimizer)
        self.decay(wanted=True)
        optimizer.register_step_post_hook(lambda *_: self.advance())

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Run exactly inside; steps are still counted."""
        self._exact_depth += 1
        try:
            yield
        finally:
            self._exact_depth -= 1

    def state_dict(self) -> dict[str, Any]:
        """Return what a later run needs to go on bit for bit.

        Plain numbers, lists and mappings, and tensors where methods keep some from step to step.
        """
        within_step = not self._counts_forwards
        calls = [self._calls.get(caller, 0) for caller in self._callers] if within_step else []
        return {
            "version": _STATE_VERSION,
            "step": self.step,
            "counts_forwards": self._counts_forwards,
            "calls": calls,
            "controllers": [c.state_dict() for c in self._controllers.values()],
            "highest_rate": self._highest_rate,
            "kept": [kept.state_dict() for kept in self._kept.values()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where another session stopped.

        Raises:
            ConfigError: if `state` is not what `state_dict` returned.
        """
        expected = {"version", "step", "counts_forwards", "calls"}
        fits = isinstance(state, dict) and expected <= set(state) and _counts(state["calls"])
        if not fits or not _are_mappings(state.get("kept", [])):
            raise ConfigError(
                f"this is no state of a graphpass session: {state!r}; give what "
                "Session.state_dict() returned"
            )
        version, step = state["version"], state["step"]
        counts, calls = state["counts_forwards"], list(state["calls"])
        if version != _STATE_VERSION or not isinstance(step, int) or step < 0:
            raise ConfigError(
                f"a session state of version {version!r} at step {step!r} cannot be loaded; this "
                f"version reads version {_STATE_VERSION}, with a step of at least 0"
            )
        self._step, self._counts_forwards = step, bool(counts)
        self._calls.clear()
        self._highest_rate = float(state.get("highest_rate", 0.0))
        # States of earlier versions have none.
        self._resumed_controllers = list(state.get("controllers", []))
        for controller, saved in zip(
            self._controllers.values(), self._resumed_controllers, strict=False
        ):
            controller.load_state_dict(saved)
        self._resumed_kept = list(state.get("kept", []))
        for number, kept in enumerate(self._kept.values()):
            kept.load_state_dict(self._saved_of(number))
        self._resumed_calls = calls
        self._calls |= {
            caller: count for caller, count in zip(self._callers, calls, strict=False) if count
        }

    def begin(self, caller: str) -> Turn:
        """Count one training call of a graph.

        Args:
            caller: `Caller.identity` of the part of the model that runs.
        """
        repeat = self.count(caller)
        return Turn(self._step, repeat, self._callers[caller])

    def count(self, caller: str) -> int:
        """Count one training call of a graph; return how many the caller made in this step.

        Args:
            caller: `Caller.identity` of the part of the model that runs.
        """
        calls = self._calls
        repeat = calls.get(caller, 0)
        if not repeat and caller not in self._callers:
            repeat = self._introduced(caller)
        if repeat and self._counts_forwards:
            self._step += 1
            calls.clear()
            repeat = 0
        if not calls and any([kept.settled for kept in self._kept.values()]):
            settle(self._kept.values(), self._step)
        calls[caller] = repeat + 1
        return repeat

    def _introduced(self, caller: str) -> int:
        """Give a caller its number; return how many calls of this step it is resumed with."""
        number = self._callers[caller] = len(self._callers)
        repeat = sum(self._resumed_calls[number : number + 1])
        if repeat:
            self._calls[caller] = repeat
        return repeat

    def layer_offset(self, owner: str, layers: int) -> int:
        """Return the number of layers in the graphs that ran before this one.

        Args:
            owner: `Owner.identity` of the graph.
            layers: number of layers in it.
        """
        if owner not in self._layers:
            before = max((start + count for start, count in self._layers.values()), default=0)
            self._layers[owner] = (before, layers)
        return self._layers[owner][0]

    def add_plan(self, owner: str, plan: Plan) -> None:
        """Note the plan of a graph; a recompilation of the same code replaces it."""
        self._plans[owner] = plan

    def kept(self, caller: str) -> Kept:
        """Return what methods keep of a caller."""
        if caller not in self._kept:
            self._kept[caller] = Kept(self._saved_of(len(self._kept)))
        return self._kept[caller]

    @property
    def parts(self) -> tuple[Kept, ...]:
        """What is planned, and kept, of every part of the model."""
        return tuple(self._kept.values())

    def _saved_of(self, number: int) -> Mapping[str, torch.Tensor]:
        return self._resumed_kept[number] if number < len(self._resumed_kept) else {}

    def add_controller(self, caller: str, controller: Steered) -> None:
        """Note what steers a caller, and let it go on from a loaded state.

        Raises:
            ConfigError: if the loaded state is not that of this model.
        """
        number = len(self._controllers)
        if caller not in self._controllers and number < len(self._resumed_controllers):
            controller.load_state_dict(self._resumed_controllers[number])
        self._controllers[caller] = controller
        self._unmeasured.pop(caller, None)
        self._again.pop(caller, None)

    def add_unmeasured(
        self, caller: str, reason: str, again: Callable[[], None] | None = None
    ) -> None:
        """Note why nothing is measured of a caller.

        Args:
            caller: `Caller.identity` of the part of the model.
            reason: why.
            again: looks whether that holds under another budget; None if it holds under any.
        """
        self._unmeasured[caller] = reason
        self._controllers.pop(caller, None)
        self._again.pop(caller, None)
        if again is not None:
            self._again[caller] = again


def _are_mappings(kept: object) -> bool:
    return isinstance(kept, list) and all(isinstance(one, Mapping) for one in kept)


def _counts(calls: object) -> bool:
    return isinstance(calls, list) and all(isinstance(n, int) and n >= 0 for n in calls)


_SESSIONS: "weakref.WeakKeyDictionary[nn.Module, Session]" = weakref.WeakKeyDictionary()
_ANONYMOUS = Session()


def session_of(model: nn.Module | None) -> Session:
    """Return the session of a model, begun if there is none yet.

    Args:
        model: the module that is compiled, not its wrapper; None for a function without one.
    """
    if model is None:
        return _ANONYMOUS
    return _SESSIONS.setdefault(model, Session())


def session(compiled_model: nn.Module) -> Session:
    """Return the session of a compiled model, before or after its first step.

    Args:
        compiled_model: what `torch.compile(model, ...)` returned, or a module compiled in place
            by `model.compile(...)`, or the model that a compiled function uses.

    Raises:
        ConfigError: if it is not a module.
    """
    if not isinstance(compiled_model, nn.Module):
        raise ConfigError(
            f"session: {compiled_model!r} is no module; give what torch.compile(model) returned, "
            "or the model itself"
        )
    return session_of(getattr(compiled_model, "_orig_mod", compiled_model))
