"""The run-time state of a model's approximate training: which step it is, and what follows.

A step is counted by default for every training forward of the model, however many graphs it was
broken into. Where that is not an optimizer step (gradient accumulation, several forwards a step),
call `advance` once per optimizer step, or let `follow(optimizer)` do it.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from codegen import draws
from graphpass.errors import ConfigError
from graphpass.plan import Plan

_STATE_VERSION = 1


class Turn(NamedTuple):
    """One call of one graph: the step it belongs to, and the seed of its draws."""

    step: int
    seed: int


class Session:
    """State of one model: the step counter, exact sections, and the plans of its graphs."""

    def __init__(self) -> None:
        """Start at step 0, counting every training forward."""
        self._step = 0
        self._counts_forwards = True
        self._exact_depth = 0
        # How often each caller (`Caller.identity`) was seen in this step.
        self._calls: dict[str, int] = {}
        # Callers in the order they first ran; gives each its own draws, the same in every run.
        self._callers: dict[str, int] = {}
        self._resumed_calls: list[int] = []
        # By `Owner.identity`, in the order of the forward pass.
        self._layers: dict[str, tuple[int, int]] = {}
        self._plans: dict[str, Plan] = {}

    @property
    def step(self) -> int:
        """Number of training steps begun (by default rule) or completed (with `advance`)."""
        begun = self._counts_forwards and any(self._calls.values())
        return self._step + (1 if begun else 0)

    @property
    def plan(self) -> Plan:
        """The plan of every graph compiled so far, in one."""
        return Plan.joined(list(self._plans.values()))

    @property
    def is_exact(self) -> bool:
        """Whether an `exact` section is open."""
        return self._exact_depth > 0

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
        """Return what a later run needs to go on bit for bit; plain numbers and lists."""
        within_step = not self._counts_forwards
        calls = [self._calls.get(caller, 0) for caller in self._callers] if within_step else []
        return {
            "version": _STATE_VERSION,
            "step": self.step,
            "counts_forwards": self._counts_forwards,
            "calls": calls,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where another session stopped.

        Raises:
            ConfigError: if `state` is not what `state_dict` returned.
        """
        expected = {"version", "step", "counts_forwards", "calls"}
        if not isinstance(state, dict) or not expected <= set(state) or not _counts(state["calls"]):
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
        self._resumed_calls = calls
        for caller, count in zip(self._callers, calls, strict=False):
            self._calls[caller] = count

    def begin(self, caller: str, seed: int) -> Turn:
        """Count one training call of a graph.

        Args:
            caller: `Caller.identity` of the part of the model that runs.
            seed: the user's seed.
        """
        if caller not in self._callers:
            number = self._callers[caller] = len(self._callers)
            if number < len(self._resumed_calls):
                self._calls[caller] = self._resumed_calls[number]
        if self._counts_forwards and self._calls.get(caller, 0):
            self._step += 1
            self._calls.clear()
        repeat = self._calls.get(caller, 0)
        self._calls[caller] = repeat + 1
        return Turn(self._step, draws.mix(seed, self._step, repeat, self._callers[caller]))

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
