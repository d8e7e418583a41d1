"""Keeps a plan within its budget: when to measure, when to plan again, when to give in.

A plan is measured when it was made and every `probe_every` steps. It is changed only where it adds
more than the budget allows, or where another one is clearly better; a changed plan is measured at
once. What measures above its budget all the same is planned anew with candidates taken for noisier
than they measured; if that does not help either, everything is exact until the next measurement.

What fails in here is no reason to lose a training run: the controller is switched off, and the plan
in force stays.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from graphpass.errors import ConfigError, Reason
from graphpass.measuring import Measured, Names, Round, table_of
from graphpass.noise import Key, NoiseTable, PlanNoise, key_of
from graphpass.plan import Decision, Plan
from graphpass.planner import all_exact
from graphpass.propagation import Propagation
from graphpass.rescue import rescued
from graphpass.sheet import Probe, Reading, Subject
from graphpass.sketch import Sketch
from graphpass.variants import EXACT, Active, warn_once
from graphpass.variants import Key as Variant

# Calls whose gradients are compared: half a difference of each pair has a relative error of
# sqrt(2 / pairs) of its own, and layers add up.
_WINDOW = 32
# Two draws, on two batches: a single one of a plan of few products is off by a quarter.
_PLAN_PROBES = 2
_SLACK = 1.1
# Below this gain another plan is not worth compiling it.
_CLEARLY = 0.03
_TRIES = 3

_Result = TypeVar("_Result")
Groups = tuple[frozenset[int], ...]


@dataclass(frozen=True, slots=True)
class Policy:
    """What the controller asks for.

    Attributes:
        probe_every: steps from one measurement to the next.
        replan: returns the best plan under the budget for what is known of the noise.
        groups: returns the candidates to be measured, in groups that one probe each looks at, for
            what is known of the noise; the groups of before, given as well, are among them.
        budget: returns the largest tau allowed now; None where noise is weighed against time.
        score: predicted time to the same loss, in any unit, of a plan under a table; None where
            nothing can be predicted: then any plan that differs is taken for better.
        first: step of the first measurement.
        stop: step from which on nothing is approximated any more; None for never.
        strict: whether a failure of ours raises, instead of switching the controller off.
    """

    probe_every: int
    replan: Callable[[NoiseTable], Plan]
    groups: Callable[[NoiseTable, Groups], Groups]
    budget: Callable[[], float | None]
    score: Callable[[Plan, NoiseTable], float] | None = None
    first: int = 0
    stop: int | None = None
    strict: bool = False


@dataclass(slots=True)
class Subplan:
    """The plan of one caller, and what it stands for in the compiled graph.

    Attributes:
        plan: what is planned now.
        at_step: returns the sites that are approximated on a step.
        numbers: numbers of the replacements that the plan approximates.
        adopt: puts another plan in its place.
        halted: called with the reason when the controller is switched off.
    """

    plan: Callable[[], Plan]
    at_step: Callable[[int], Active]
    numbers: Callable[[], Active]
    adopt: Callable[[Plan], None]
    halted: Callable[[str], None]


class Controller:
    """Decides for one caller of one graph; see the module's text.

    Attributes:
        measured: what was found last; None before.
        note: why nothing is measured, or why the plan was given up; "" otherwise.
        is_halted: whether it was switched off: it measures and plans no more.
    """

    def __init__(self, policy: Policy, subject: Subject, names: Names, current: Subplan) -> None:
        """Measure nothing yet.

        Args:
            policy: when to measure, and what to plan.
            subject: what is known of the graph.
            names: what its parts are called.
            current: the plan that it may change.
        """
        self.measured: Measured | None = None
        self.note = ""
        self.is_halted = False
        self._policy = policy
        self._subject = subject
        self._names = names
        self._current = current
        self._due = policy.first
        self._round: Round | None = None
        self._saved_round: Mapping[str, Any] | None = None
        self._table = NoiseTable()
        # What was measured: probes that are compiled already are run again as they are.
        self._groups: Groups = ()
        # By how much plans measured noisier than the table has them.
        self._caution = 1.0
        # Rounds of the plan alone since it was changed; 0 where the next looks at everything.
        self._checks = 0
        self._failures = 0
        self._insisted = False
        self._budget_changed = False

    def turn(
        self, step: int, parameters: Mapping[int, Tensor], device: torch.device
    ) -> tuple[Variant, Tensor | None]:
        """Return what a training call runs, and where a probe leaves its numbers.

        Args:
            step: the step it belongs to.
            parameters: what is trained, by position among the graph's inputs.
            device: where the graph runs.
        """
        self._guarded(lambda: self._advance(step, parameters, device))
        # The user's own schedule: what fails in it is not ours.
        active = self._current.at_step(step)
        probe = self._guarded(
            lambda: self._round and self._round.next(bool(active), parameters, device)
        )
        return probe or (active, None)

    def halt(self, why: str) -> None:
        """Switch off: measure and plan no more; the plan in force stays.

        Args:
            why: what failed.
        """
        if self.is_halted:
            return
        self.is_halted = True
        self.note = f"noise is not measured any more and the plan is left as it is: {why}"
        if self._round is not None:
            self._round.close()
        self._round = self._saved_round = None
        self._current.halted(self.note)

    def _guarded(self, work: Callable[[], _Result]) -> _Result | None:
        """Return what a part of the work returns; None once the controller is switched off."""

        def otherwise(failure: str) -> None:
            self.halt(failure)
            warn_once(self.note)

        return None if self.is_halted else rescued(work, otherwise, self._policy.strict)

    def _advance(self, step: int, parameters: Mapping[int, Tensor], device: torch.device) -> None:
        """Do what is due before a call: read a round that is over, decide, begin another."""
        if self._saved_round is not None:
            self._resume_round(parameters, device)
        if self._round is not None and self._round.is_over:
            self._finish(step)
        if self._budget_changed and self._round is None and self.measured is not None:
            self._budget_changed = False
            self._decide(step, self._noise_of(self._current.plan()).tau, full=True)
        past = self._policy.stop is not None and step >= self._policy.stop
        if self._round is None and step >= self._due and not past:
            self._round = self._new_round(parameters)

    def budget_changed(self) -> None:
        """Plan again on the next call, with what is known already."""
        self._budget_changed = True

    # Rounds.

    def _new_round(self, parameters: Mapping[int, Tensor]) -> Round:
        """Return a round: of everything, or, after a change of plan, of the new plan alone."""
        plan = self._current.numbers()
        probes = [Probe(EXACT, plan)] * _PLAN_PROBES if plan else []
        if self._checks:
            return Round(probes, self._subject, 0, None)
        self._groups = self._policy.groups(self._table, self._groups)
        every = [Probe(group, EXACT) for group in self._groups]
        return Round([*every, *probes], self._subject, _WINDOW, Sketch(_trained(parameters)))

    def _finish(self, step: int) -> None:
        assert self._round is not None
        finished, self._round = self._round, None
        finished.close()
        found, compared = finished.read(), finished.batch_noise()
        full = not self._checks
        if found is None or (full and compared is None):
            self._fail(step)
            return
        self._failures = 0
        readings: dict[Probe, list[Reading]] = {}
        for probe, reading in zip(finished.probes, found, strict=True):
            readings.setdefault(probe, []).append(reading)
        share = finished.approximate_share
        self._table, tau = table_of(readings, compared, share, self._names, self._table)
        self.measured = Measured(step, tau, self._noise_of(self._current.plan()), self._table)
        self.note = ""
        self._decide(step, tau, full)

    def _fail(self, step: int) -> None:
        """Look again at once, but not for ever."""
        self._failures += 1
        self.note = "the last measurement had no finite number, or no backward pass"
        again = self._failures < _TRIES
        self._due = step if again else step + self._policy.probe_every
        if not again:
            self._failures = self._checks = 0

    # Decisions.

    def _decide(self, step: int, tau: float, full: bool) -> None:
        """Keep the plan, or change it and have the new one measured.

        Args:
            step: the step.
            tau: what the plan adds.
            full: whether everything was measured, and not this plan alone.
        """
        limit, plan = self._policy.budget(), self._current.plan()
        if limit is not None and tau > limit * _SLACK:
            self._reduce(step, tau, limit)
            return
        if full:
            self._caution = max(1.0, self._caution / 2)
            proposal = self._proposal()
            if _same(proposal, plan):
                # As before, but reports are to show what was measured of it.
                self._current.adopt(proposal)
            elif self._better(proposal, plan):
                self._adopt(step, proposal)
                return
        self._settle(step)

    def _reduce(self, step: int, tau: float, limit: float) -> None:
        """Change a plan that adds more than it may; in the end, give in."""
        plan = self._current.plan()
        predicted = self._noise_of(plan).tau
        if self._checks:
            self._insist(tau, limit)
        if predicted:
            self._caution = max(self._caution, tau / predicted)
        for _ in range(_TRIES):
            proposal = self._proposal()
            if self._checks < _TRIES and not _same(proposal, plan):
                self._adopt(step, proposal)
                return
            self._caution *= 2
        self._insist(tau, limit)
        self._current.adopt(all_exact(plan, Reason.OVER_BUDGET.value))
        self._settle(step)

    def _insist(self, tau: float, limit: float) -> None:
        """Say, once, that less is approximated than the table allows."""
        self.note = (
            f"measured noise of {tau:.3g} is over the budget of {limit:.3g} after planning again: "
            "less is approximated"
        )
        if not self._insisted:
            warn_once(self.note)
        self._insisted = True

    def _proposal(self) -> Plan:
        return self._policy.replan(self._table.scaled(self._caution))

    def _adopt(self, step: int, plan: Plan) -> None:
        self._current.adopt(plan)
        if not plan.approximated:
            self._settle(step)
            return
        self._checks, self._due = self._checks + 1, step

    def _settle(self, step: int) -> None:
        self._checks, self._due = 0, step + self._policy.probe_every

    def _better(self, proposal: Plan, plan: Plan) -> bool:
        score = self._policy.score
        if score is None:
            return True
        return score(proposal, self._table) < (1 - _CLEARLY) * score(plan, self._table)

    def _noise_of(self, plan: Plan) -> PlanNoise:
        known = self._table.entries
        chosen = [key for key in map(key_of_decision, plan.approximated) if key in known]
        return Propagation(self._table, self._names.reach).plan(chosen)

    # Resuming.

    def state_dict(self) -> dict[str, Any]:
        """Return what a later run needs to decide the same; plain numbers, lists and strings."""
        return {
            "due": self._due,
            "caution": self._caution,
            "checks": self._checks,
            "failures": self._failures,
            "budget_changed": self._budget_changed,
            "table": self._table.to_json(),
            "groups": [sorted(group) for group in self._groups],
            "measured": self._measured_state(),
            "plan": [
                [d.site, d.method, dict(d.params), d.reason] for d in self._current.plan().decisions
            ],
            "round": self._saved_round if self._round is None else self._round.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another controller of the same graph stood.

        Raises:
            ConfigError: if the state is not that of a controller of this graph.
        """
        try:
            self._load(state)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"the session state does not fit this model: {type(error).__name__}: {error}; "
                "begin a new session, or load what was saved for the same model and options"
            ) from error

    def _load(self, state: Mapping[str, Any]) -> None:
        table = NoiseTable.from_json(state["table"])
        plan, saved = self._current.plan(), state["plan"]
        if [row[0] for row in saved] != [decision.site for decision in plan.decisions]:
            raise ValueError("it was saved for other products")
        decisions = tuple(
            replace(decision, method=method, params=params, reason=reason)
            for decision, (_, method, params, reason) in zip(plan.decisions, saved, strict=True)
        )
        self._due, self._caution = int(state["due"]), float(state["caution"])
        self._checks, self._failures = int(state["checks"]), int(state["failures"])
        self._budget_changed, self._table = bool(state["budget_changed"]), table
        if state["measured"] is not None:
            step, tau, *predicted = state["measured"]
            self.measured = Measured(step, tau, PlanNoise(*predicted), table)
        # A round of a version that measured every candidate is begun anew.
        self._saved_round = state["round"] if "groups" in state else None
        self._groups = tuple(map(frozenset, state.get("groups", ())))
        if decisions != plan.decisions:
            self._current.adopt(replace(plan, decisions=decisions))

    def _measured_state(self) -> list[float] | None:
        if self.measured is None:
            return None
        predicted = self.measured.predicted
        numbers = [predicted.tau, predicted.from_inputs, predicted.bias]
        return [self.measured.step, self.measured.tau, *numbers]

    def _resume_round(self, parameters: Mapping[int, Tensor], device: torch.device) -> None:
        saved, self._saved_round = self._saved_round, None
        assert saved is not None
        self._round = self._new_round(parameters)
        self._round.load_state_dict(saved, device)


def key_of_decision(decision: Decision) -> Key:
    """Return the key that a table has for an approximated product."""
    assert decision.method is not None
    return key_of(decision.site, decision.method, decision.params)


def _same(one: Plan, other: Plan) -> bool:
    def chosen(plan: Plan) -> set[Key]:
        return set(map(key_of_decision, plan.approximated))

    return chosen(one) == chosen(other)


def _trained(parameters: Mapping[int, Tensor]) -> dict[int, Tensor]:
    return {position: p for position, p in parameters.items() if p.requires_grad}
