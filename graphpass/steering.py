"""What steers one caller of a compiled graph: which candidates are measured, and what is asked for.

Plans that the user made, by naming methods or by handing one in, are left as they are.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from graphpass import pricing as prices
from graphpass import prior
from graphpass.budget import AccuracyDrop, Speedup
from graphpass.candidates import ladder
from graphpass.capture import Analysis
from graphpass.controller import Controller, Groups, Policy, Subplan
from graphpass.dependence import reach_of
from graphpass.errors import ConfigError, Reason
from graphpass.measuring import Names
from graphpass.noise import LocalNoise, NoiseTable, key_of
from graphpass.options import Options
from graphpass.plan import Plan
from graphpass.planner import make_plan, replacements
from graphpass.prediction import Prediction, predict
from graphpass.pricing import Pricing
from graphpass.products import Replacement
from graphpass.session import Session
from graphpass.shortlist import UNKNOWN, Shortlist
from graphpass.site import Gradient
from graphpass.variants import Variants

# The first steps of a run are like none of the later ones: of ResNet-20 on CIFAR-10, consecutive
# gradients showed 2.0 times the noise of the batch at step 25, 1.3 at 215, and 1.05 at 515.
_FIRST_STEP = 200
# A plan that begins later is measured right before.
_MEASURING_STEPS = 40
# Of an exact step, what the candidates of one probe may take beside it; the rest is in others.
_PROBE_SHARE = 1.2


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a model that is steered.

    Attributes:
        analysis: what its graph holds, by the names of this part.
        options: what the user asked for.
        offset: number of layers in the graphs before this one.
        modules: paths of the model's modules that may hold products; None if not known.
        session: the model's session.
        parameters: names of the parameters by their position among the graph's inputs.
    """

    analysis: Analysis
    options: Options
    offset: int
    modules: Collection[str] | None
    session: Session
    parameters: Mapping[int, str]


def why_not(analysis: Analysis, options: Options, frozen: bool) -> str | None:
    """Return why nothing is measured of a graph; None if it is.

    Args:
        analysis: what the graph holds.
        options: what the user asked for.
        frozen: whether no variant can be compiled once training runs.
    """
    if isinstance(options.methods, Mapping) or options.plan is not None:
        return Reason.GIVEN_PLAN.value
    if options.budget == 0:
        return Reason.BUDGET_ZERO.value
    if frozen:
        return Reason.DYNAMIC_SIZES.value
    return None if analysis.ends else Reason.NO_WEIGHTS.value


def controller_of(part: Part, variants: Variants, current: Subplan) -> Controller | str:
    """Return what keeps the plan of a part within its budget, or why nothing does."""
    pricing = prices.of(part.analysis, torch.get_num_threads(), part.options.replays)
    offers = (*replacements(current.plan(), part.analysis.sites), *_offers(part, pricing))
    candidates = {
        variants.position(replacement): replacement
        for replacement in offers
        # Probes compare gradients of one forward pass.
        if replacement.site.gradient is not Gradient.FORWARD
    }
    if not candidates or not (current.numbers() or _could_pay(part, offers, pricing)):
        return Reason.NOTHING_PAYS.value
    names = names_of(part.analysis, candidates, part.parameters)
    shortlist = Shortlist(part.analysis, tuple(dict.fromkeys(offers)), pricing)

    def groups(table: NoiseTable, before: Groups) -> Groups:
        worth = shortlist.keys(table, _unknown(part))
        measured, planned = frozenset[int]().union(*before), current.numbers()
        new = {
            number: candidate
            for number, candidate in candidates.items()
            if number not in measured and (number in planned or names.candidates[number] in worth)
        }
        return (*before, *_groups(new, part, pricing)) if new else before

    policy = _policy(part, pricing, current, shortlist, groups)
    return Controller(policy, variants.subject, names, current)


def names_of(
    analysis: Analysis, candidates: Mapping[int, Replacement], parameters: Mapping[int, str]
) -> Names:
    """Return what the numbers of a graph are called.

    Args:
        analysis: what it holds.
        candidates: what is measured, by its number among the replacements.
        parameters: names of the parameters by position.
    """
    sites = analysis.sites
    weights: dict[str, tuple[int, ...]] = {}
    for number, position in analysis.ends:
        weights[sites[number].id] = (*weights.get(sites[number].id, ()), position)
    keys = {i: key_of(r.site.id, r.method.name, r.params) for i, r in candidates.items()}
    return Names(keys, parameters, weights, reach_of(analysis.flow, sites))


def _could_pay(part: Part, offers: Sequence[Replacement], pricing: Pricing) -> bool:
    """Return whether the planner would approximate anything if no candidate added any noise.

    If not, measuring noise changes nothing, and takes time: rounds of it, and something every step.
    """
    nothing = LocalNoise(0.0, 0.0, 1.0)
    entries = {key_of(r.site.id, r.method.name, r.params): nothing for r in offers}
    table = replace(prior.noise_table(part.analysis, {}), entries=entries)
    wanted = replace(part.options, budget=part.session.budget(part.options.budget))
    plan = make_plan(part.analysis, wanted, part.offset, part.modules, table, pricing)
    return bool(plan.approximated)


def _groups(candidates: Mapping[int, Replacement], part: Part, pricing: Pricing) -> Groups:
    """Return the candidates in groups, each of which a single probe looks at."""
    step_s = pricing.rest().seconds + sum(pricing.exact(s).seconds for s in part.analysis.sites)
    groups: list[set[int]] = [set()]
    taken_s = 0.0
    for number, candidate in sorted(candidates.items()):
        seconds = pricing.approximate(candidate.site, candidate.method, candidate.params).seconds
        if groups[-1] and taken_s + seconds > _PROBE_SHARE * step_s:
            groups.append(set())
            taken_s = 0.0
        groups[-1].add(number)
        taken_s += seconds
    return tuple(map(frozenset, groups))


def _offers(part: Part, pricing: Pricing) -> list[Replacement]:
    """Return every approximation that the planner may choose and that saves time."""
    options, found = part.options, []
    schedule = options.resolved_schedule()
    names = None if options.methods is None else tuple(options.methods)
    for site in part.analysis.sites:
        legal = site.gradient.value in options.gradients and site.reason is None
        if not legal or not schedule.may_select(site.layer + part.offset):
            continue
        exact_s = pricing.exact(site).seconds
        for method, params in ladder(site, names):
            if (method.unbiased or options.max_bias) and method.reject(site, params) is None:
                price = pricing.approximate(site, method, params)
                # What is shared may be paid for by another product.
                if price.seconds - sum(price.shared.values()) < exact_s:
                    found.append(Replacement(site, method, params))
    return found


def _budget(part: Part) -> Any:
    """Return the budget as set in the session: a number, or what is no limit of the noise."""
    budget = part.session.budget(part.options.budget)
    return budget.tau if isinstance(budget, AccuracyDrop) else budget


def _unknown(part: Part) -> float:
    """Return what a method without a prior is supposed to add: no more than may be added."""
    budget = _budget(part)
    no_limit = isinstance(budget, (str, Speedup)) or not budget
    return UNKNOWN if no_limit else min(UNKNOWN, float(budget))


def _policy(
    part: Part,
    pricing: Pricing,
    current: Subplan,
    shortlist: Shortlist,
    groups: Callable[[NoiseTable, Groups], Groups],
) -> Policy:
    options, schedule = part.options, part.options.resolved_schedule()

    def asked() -> Any:
        """Return the budget as it is now: as set in the session, and decayed."""
        budget = _budget(part)
        if isinstance(budget, (str, Speedup)):
            return budget
        return budget * part.session.decay(options.decay_budget)

    def limit() -> float | None:
        budget = asked()
        return None if isinstance(budget, (str, Speedup)) else float(budget)

    def replan(table: NoiseTable) -> Plan:
        wanted, known = replace(options, budget=asked()), shortlist.labelled(table)
        try:
            return make_plan(part.analysis, wanted, part.offset, part.modules, known, pricing)
        except ConfigError:
            # What was possible by the prior is not by what was measured: the plan stays.
            return current.plan()

    def score(plan: Plan, table: NoiseTable) -> float:
        planned = replacements(plan, part.analysis.sites)
        return _figure(asked())(predict(part.analysis, planned, pricing, table))

    begin = max(options.warmup_steps, schedule.start)
    first = max(begin - _MEASURING_STEPS, _FIRST_STEP)
    return Policy(
        options.probe_every, replan, groups, limit, score, first, schedule.stop, options.strict
    )


def _figure(budget: Any) -> Callable[[Prediction], float]:
    """Return what a budget leaves to be made small."""
    if isinstance(budget, Speedup):
        return lambda prediction: prediction.tau or 0.0
    if isinstance(budget, str):
        return lambda prediction: prediction.time_ratio or 1.0
    return lambda prediction: prediction.step_s
