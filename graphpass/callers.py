"""Who calls a compiled graph, and what is approximated in that call.

Dynamo shares what it compiles: two models of one class run the same graph, and so do the blocks of
one model where it was traced block by block. They are told apart by the parameters that they pass;
each has its own session, its own place among the layers, and its own plan.

Training goes on where something of ours fails on the way: in planning for a newcomer (it runs
exactly), in what steers a plan, or in compiling what a plan asks for.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from graphpass.capture import Analysis
from graphpass.controller import Controller, Subplan
from graphpass.dispatcher import Choice
from graphpass.errors import Reason
from graphpass.options import Options
from graphpass.owner import Owner, compiled_model, parameter_path
from graphpass.plan import Plan
from graphpass.planner import all_exact, make_plan, replacements
from graphpass.products import Replacement
from graphpass.recompute import NONE, Recomputation, backward_pass, repeats
from graphpass.report import TrainingGraph, forget, record
from graphpass.rescue import rescued
from graphpass.session import Session, session_of
from graphpass.sheet import Probe, Subject
from graphpass.site import Gradient
from graphpass.steering import Part, controller_of, why_not
from graphpass.variants import EXACT, Active, Compiled, Key, Variants, warn_once

# What an exact call runs; it draws nothing.
_NOTHING = Choice(EXACT, 0)
# Reasons to steer nothing that another budget may do away with.
_BY_BUDGET = (Reason.BUDGET_ZERO, Reason.NOTHING_PAYS)


@dataclass(slots=True)
class Caller:
    """One part of one model that runs the graph.

    Attributes:
        owner: the model, and which part of it.
        identity: tells this part of the model from its other parts, in the session.
        session: the model's session.
        plan: what is planned for this part.
        layers: number of the layer of each planned site, by its position among the replacements.
        planned: what is planned, by that position, with the sites as they are called here.
        kept: what methods keep from step to step, by what is approximated in a step.
        analysis: what the graph holds, by the names of this part.
        graph: what reports say of this part; None where they say it of another model.
        controller: what keeps the plan within its budget; None where the plan stays as it is.
    """

    owner: Owner
    identity: str
    session: Session
    plan: Plan
    analysis: Analysis
    layers: dict[int, int] = field(default_factory=dict)
    planned: dict[int, Replacement] = field(default_factory=dict)
    kept: dict[Active, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    graph: TrainingGraph | None = None
    controller: Controller | None = None

    def training(self) -> bool:
        """Return whether the model is in training mode now; True where no model is known."""
        model = self.owner.the_model()
        return model is None or model.training

    def at_step(self, step: int) -> Active:
        """Return what is approximated on a step."""
        if step < self.plan.warmup_steps:
            return EXACT
        selects = self.plan.schedule.selects
        return frozenset(i for i, layer in self.layers.items() if selects(layer, step))

    def kept_for(self, active: Active) -> tuple[torch.Tensor, ...]:
        """Return what the methods of these sites keep from step to step."""
        if active not in self.kept:
            planned = [self.planned[number] for number in sorted(active)]
            self.kept[active] = self.session.kept(self.identity).of(planned)
        return self.kept[active]


class Callers:
    """Everyone who calls one compiled graph; decides what each call approximates."""

    def __init__(
        self,
        analysis: Analysis,
        key: str,
        options: Options,
        owner: Owner,
        inputs: Sequence[Any],
        variants: Variants,
    ) -> None:
        """Plan for the part of the model that the graph was traced from.

        Args:
            analysis: what the graph holds.
            key: identity of the graph in the cache.
            options: what the user asked for.
            owner: the part of the model that the graph was traced from.
            inputs: example inputs of the graph.
            variants: variants of the graph; gets what is planned.

        Raises:
            ConfigError: if the options do not fit the model.
        """
        self._analysis = analysis
        self._key = key
        self._options = options
        self._variants = variants
        self._graphs: list[TrainingGraph] = []
        self._parameter = first_parameter(inputs)
        self._device = device_of(inputs)
        self._known: dict[int, tuple[weakref.ref[Any], Caller]] = {}
        self._recomputation = Recomputation()
        weights = tuple(site for site in analysis.sites if site.gradient is Gradient.WEIGHT)
        variants.subject = Subject(weights, variants.subject.parameters)
        self._frozen = bool(analysis.hints) or any(isinstance(x, torch.SymInt) for x in inputs)
        self.first = self._plan_for(owner, analysis, inputs)
        if self._parameter is not None:
            self._remember(inputs[self._parameter], self.first)

    def shortcut(self, run: Compiled) -> Compiled:
        """Return what Dynamo is to call: `run`, but for calls in which nothing is approximated.

        A call of a small perceptron takes a tenth of a millisecond. What is done in Python takes
        three times as long there as in a loop of its own: of ten functions, two are left.

        Args:
            run: what any call can be made by.
        """
        first, position, compiled = self.first, self._parameter, self._variants.compiled
        model, session, identity = first.owner.model, first.session, first.identity
        if position is None or model is None:
            return run
        parameter, _ = next(iter(self._known.values()))

        def dispatch(*args: Any) -> Any:
            owner, exact = model(), compiled.get(EXACT)
            is_first = args[position] is parameter() and backward_pass() == NONE
            is_idle = is_first and not first.layers and first.controller is None
            if is_idle and exact is not None and owner is not None and owner.training:
                session.count(identity)
                return exact(*args)
            return run(*args)

        return dispatch

    def choose(self, args: Sequence[Any]) -> Choice:
        """Return what a call approximates, and the seed of its draws."""
        caller = self._caller(args)
        if caller.layers or caller.controller:
            return self._recomputation.choose(lambda: self._choose(caller, args))
        # Nothing to choose: the step is counted, and that is all.
        if caller.training() and not repeats():
            caller.session.count(caller.identity)
        return _NOTHING

    def remember(self) -> None:
        """Write to disk what compiling the variants showed."""
        for graph in self._graphs:
            graph.remember()

    def give_up(self, reason: str) -> None:
        """Note that everything runs exactly after all, and why."""
        for graph in self._graphs:
            graph.plan = all_exact(graph.plan, reason)
        self.first.session.add_plan(self.first.identity, all_exact(self.first.plan, reason))

    def failed(self, key: Key, why: str) -> None:
        """Leave the plans as they are that a variant was compiled for; exact, if all of one.

        Args:
            key: what could not be compiled.
            why: what is said of it.
        """
        known = [caller for _, caller in self._known.values()]
        for caller in known or [self.first]:
            whole = frozenset(caller.layers)
            if not isinstance(key, Probe) and not key <= whole:
                continue
            if key == whole:
                self._adopt(caller, all_exact(caller.plan, why))
            if caller.controller is not None:
                caller.controller.halt(why)
            else:
                _halted(caller, why)

    def withdraw(self) -> None:
        """Take the reports back: the graph is compiled in another way."""
        for graph in self._graphs:
            forget(graph)

    def _choose(self, caller: Caller, args: Sequence[Any]) -> Choice:
        if not caller.training():
            return _NOTHING
        turn = caller.session.begin(caller.identity)
        if caller.session.is_exact:
            return _NOTHING
        seed = turn.seed(self._options.seed)
        if caller.controller is None:
            active = caller.at_step(turn.step)
            return Choice(active, seed, step=turn.step, kept=caller.kept_for(active))
        trained = {position: args[position] for position in self._variants.subject.parameters}
        device = args[self._variants.subject.parameters[0]].device
        key, page = caller.controller.turn(turn.step, trained, device)
        return Choice(key, seed, page)

    def _caller(self, args: Sequence[Any]) -> Caller:
        if self._parameter is None:
            return self.first
        parameter = args[self._parameter]
        known = self._known.get(id(parameter))
        # The number of an object that is gone may be given to another one.
        if known is not None and known[0]() is parameter:
            return known[1]
        caller = self._newcomer(parameter, args)
        self._remember(parameter, caller)
        return caller

    def _remember(self, parameter: torch.Tensor, caller: Caller) -> None:
        self._known[id(parameter)] = (weakref.ref(parameter), caller)

    def _newcomer(self, parameter: torch.Tensor, args: Sequence[Any]) -> Caller:
        base = self.first.owner
        model = compiled_model() or base.the_model()
        path = parameter_path(model, parameter)
        if model is None or not path or not base.parameter:
            return self.first
        owner = replace(base, model=weakref.ref(model), parameter=path)
        analysis = _moved(self._analysis, base.parameter, path)
        return rescued(
            lambda: self._plan_for(owner, analysis, args),
            lambda failure: self._unplanned(owner, analysis, failure),
            self._options.strict,
        )

    def _unplanned(self, owner: Owner, analysis: Analysis, failure: str) -> Caller:
        """Return a caller that runs exactly, as no plan could be made for it."""
        why = f"no plan could be made for a model that shares a graph; it runs exactly: {failure}"
        warn_once(why)
        session, identity = session_of(owner.the_model()), owner.identity(analysis.sites)
        session.add_unmeasured(identity, why)
        return Caller(owner, identity, session, Plan(()), analysis)

    def _plan_for(self, owner: Owner, analysis: Analysis, inputs: Sequence[Any]) -> Caller:
        session = session_of(owner.the_model())
        identity = owner.identity(analysis.sites)
        offset = session.layer_offset(identity, analysis.layers)
        modules = owner.product_modules()
        options = replace(self._options, budget=session.budget(self._options.budget))
        plan = make_plan(analysis, options, offset, modules)
        caller = Caller(owner, identity, session, plan, analysis)
        self._put(caller, plan)
        own = analysis is self._analysis
        if not own or not self._graphs:
            caller.graph = record(analysis, plan, self._key if own else "", self._variants.log)
            self._graphs.append(caller.graph)
        names = parameter_names(owner.the_model(), inputs, self._variants.subject.parameters)
        self._steer(caller, Part(analysis, self._options, offset, modules, session, names))
        return caller

    def _put(self, caller: Caller, plan: Plan) -> None:
        """Let a caller have a plan, and its session room for what the plan's methods keep."""
        planned = replacements(plan, caller.analysis.sites)
        # The graph knows its sites by their nodes: what they are called elsewhere is no matter.
        numbers = list(map(self._variants.position, planned))
        layers = (decision.layer for decision in plan.approximated)
        caller.plan, caller.layers = plan, dict(zip(numbers, layers, strict=True))
        caller.planned = dict(zip(numbers, planned, strict=True))
        caller.kept.clear()
        caller.session.kept(caller.identity).adopt(planned, self._device)
        caller.session.add_plan(caller.identity, plan)

    def _adopt(self, caller: Caller, plan: Plan) -> None:
        """Put another plan in a caller's place."""
        before = caller.layers
        self._put(caller, plan)
        if caller.graph is not None:
            caller.graph.plan = plan
        if caller.layers == before:
            return
        callers = [known for _, known in self._known.values()]
        in_use = {frozenset(other.layers) for other in (caller, *callers)}
        self._variants.retire(in_use, self._options.max_variants)

    def _steer(self, caller: Caller, part: Part) -> None:
        """Give a caller its controller, or note why it has none under the budget of its session."""
        options = replace(part.options, budget=caller.session.budget(part.options.budget))

        def again_under(reason: str) -> Callable[[], None] | None:
            return partial(self._steer, caller, part) if reason in _BY_BUDGET else None

        reason = why_not(part.analysis, options, self._frozen)
        if reason is not None:
            caller.session.add_unmeasured(caller.identity, reason, again_under(reason))
            return
        current = Subplan(
            plan=lambda: caller.plan,
            at_step=caller.at_step,
            numbers=lambda: frozenset(caller.layers),
            adopt=partial(self._adopt, caller),
            halted=partial(_halted, caller),
        )
        steered = rescued(
            lambda: controller_of(part, self._variants, current),
            partial(_unsteered, caller),
            self._options.strict,
        )
        if isinstance(steered, str):
            caller.session.add_unmeasured(caller.identity, steered, again_under(steered))
            return
        caller.controller = steered
        caller.session.add_controller(caller.identity, steered)


def _halted(caller: Caller, why: str) -> None:
    """Let the report of a caller say why its plan is left as it is."""
    if caller.graph is not None:
        caller.graph.halted = why


def _unsteered(caller: Caller, failure: str) -> str:
    """Return why nothing steers a caller, and say so."""
    why = f"noise is not measured and the plan is left as it is: {failure}"
    warn_once(why)
    _halted(caller, why)
    return why


def first_parameter(inputs: Sequence[Any]) -> int | None:
    """Return the position of the first parameter among a graph's inputs; None without one."""
    positions = (i for i, x in enumerate(inputs) if isinstance(x, torch.nn.Parameter))
    return next(positions, None)


def device_of(inputs: Sequence[Any]) -> torch.device:
    """Return the device of the first parameter among a graph's inputs; the CPU without one."""
    first = first_parameter(inputs)
    return torch.device("cpu") if first is None else inputs[first].device


def parameter_names(
    model: torch.nn.Module | None, inputs: Sequence[Any], positions: Sequence[int]
) -> dict[int, str]:
    """Return the paths of parameters in the model, by position among a graph's inputs."""
    paths = {} if model is None else {id(p): path for path, p in model.named_parameters()}
    return {i: paths.get(id(inputs[i]), f"parameter {i}") for i in positions}


def _moved(analysis: Analysis, old: str, new: str) -> Analysis:
    """Return an analysis with the paths of another part of the model.

    Args:
        analysis: what the graph holds, by the paths of the part it was traced from.
        old: path of a parameter of that part.
        new: path of the same parameter of the other part.
    """
    old_parts, new_parts = old.split("."), new.split(".")
    while old_parts and new_parts and old_parts[-1] == new_parts[-1]:
        old_parts.pop()
        new_parts.pop()
    if not old_parts:
        return analysis
    here, there = ".".join(old_parts), ".".join(new_parts)

    def moved(path: str) -> str:
        inside = path == here or path.startswith((f"{here}.", f"{here}#"))
        return there + path[len(here) :] if inside else path

    sites = tuple(
        replace(site, path=moved(site.path), name=moved(site.name)) for site in analysis.sites
    )
    return replace(analysis, sites=sites)
