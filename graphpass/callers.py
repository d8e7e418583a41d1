"""Who calls a compiled graph, and what is approximated in that call.

Dynamo shares what it compiles: two models of one class run the same graph, and so do the blocks of
one model where it was traced block by block. They are told apart by the parameters that they pass;
each has its own session, its own place among the layers, and its own plan.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from graphpass.capture import Analysis
from graphpass.flow import Flow
from graphpass.options import Options
from graphpass.owner import Owner, compiled_model, parameter_path
from graphpass.plan import Plan
from graphpass.planner import all_exact, make_plan, replacements
from graphpass.recompute import Recomputation
from graphpass.report import TrainingGraph, forget, record
from graphpass.session import Session, session_of
from graphpass.sheet import Subject
from graphpass.site import Gradient
from graphpass.variants import EXACT, Active, Choice, Variants


@dataclass(frozen=True, slots=True)
class Caller:
    """One part of one model that runs the graph.

    Attributes:
        owner: the model, and which part of it.
        identity: tells this part of the model from its other parts, in the session.
        session: the model's session.
        plan: what is planned for this part.
        layers: number of the layer of each planned site, by its position among the replacements.
    """

    owner: Owner
    identity: str
    session: Session
    plan: Plan
    layers: dict[int, int]

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
        self._known: dict[int, tuple[weakref.ref[Any], Caller]] = {}
        self._recomputation = Recomputation()
        weights = tuple(site for site in analysis.sites if site.gradient is Gradient.WEIGHT)
        variants.subject = Subject(weights, variants.subject.parameters)
        self.first = self._plan_for(owner, analysis)
        if self._parameter is not None:
            self._remember(inputs[self._parameter], self.first)

    def choose(self, args: Sequence[Any]) -> Choice:
        """Return what a call approximates, and the seed of its draws."""
        return self._recomputation.choose(lambda: self._choose(args))

    def remember(self) -> None:
        """Write to disk what compiling the variants showed."""
        for graph in self._graphs:
            graph.remember()

    def give_up(self, reason: str) -> None:
        """Note that everything runs exactly after all, and why."""
        for graph in self._graphs:
            graph.plan = all_exact(graph.plan, reason)
        self.first.session.add_plan(self.first.identity, all_exact(self.first.plan, reason))

    def withdraw(self) -> None:
        """Take the reports back: the graph is compiled in another way."""
        for graph in self._graphs:
            forget(graph)

    def _choose(self, args: Sequence[Any]) -> Choice:
        caller = self._caller(args)
        if not caller.training():
            return Choice(EXACT, 0)
        turn = caller.session.begin(caller.identity, self._options.seed)
        active = EXACT if caller.session.is_exact else caller.at_step(turn.step)
        return Choice(active, turn.seed)

    def _caller(self, args: Sequence[Any]) -> Caller:
        if self._parameter is None:
            return self.first
        parameter = args[self._parameter]
        known = self._known.get(id(parameter))
        # The number of an object that is gone may be given to another one.
        if known is not None and known[0]() is parameter:
            return known[1]
        caller = self._newcomer(parameter)
        self._remember(parameter, caller)
        return caller

    def _remember(self, parameter: torch.Tensor, caller: Caller) -> None:
        self._known[id(parameter)] = (weakref.ref(parameter), caller)

    def _newcomer(self, parameter: torch.Tensor) -> Caller:
        base = self.first.owner
        model = compiled_model() or base.the_model()
        path = parameter_path(model, parameter)
        if model is None or not path or not base.parameter:
            return self.first
        owner = replace(base, model=weakref.ref(model), parameter=path)
        return self._plan_for(owner, _moved(self._analysis, base.parameter, path))

    def _plan_for(self, owner: Owner, analysis: Analysis) -> Caller:
        session = session_of(owner.the_model())
        identity = owner.identity(analysis.sites)
        offset = session.layer_offset(identity, analysis.layers)
        plan = make_plan(analysis, self._options, offset, owner.product_modules())
        planned = replacements(plan, analysis.sites)
        layers = {
            # The graph knows its sites by their nodes: what they are called elsewhere is no matter.
            self._variants.position(replacement): decision.layer
            for replacement, decision in zip(planned, plan.approximated, strict=True)
        }
        session.add_plan(identity, plan)
        own = analysis is self._analysis
        if not own or not self._graphs:
            graph = record(analysis, plan, self._key if own else "", self._variants.log)
            self._graphs.append(graph)
        return Caller(owner, identity, session, plan, layers)


def first_parameter(inputs: Sequence[Any]) -> int | None:
    """Return the position of the first parameter among a graph's inputs; None without one."""
    positions = (i for i, x in enumerate(inputs) if isinstance(x, torch.nn.Parameter))
    return next(positions, None)


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
    names = {old.id: new.id for old, new in zip(analysis.sites, sites, strict=True)}
    reached = {
        names[site]: tuple(names[weight] for weight in weights)
        for site, weights in analysis.flow.reached.items()
    }
    weights = {names[site]: ends for site, ends in analysis.flow.weights.items()}
    return replace(analysis, sites=sites, flow=Flow(reached, weights))
