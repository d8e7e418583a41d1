"""Decide for every site how it is computed: as the user named it, or by spending the budget.

Pure functions: the same sites, options, prices and noise give the same plan. Prices may become
better known on the way: products are timed where a plan turns on them and they are in doubt.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch

from graphpass import pricing as prices
from graphpass.candidates import menus
from graphpass.capture import Analysis
from graphpass.doubts import doubts
from graphpass.errors import ConfigError, Reason, Rejected
from graphpass.method import Method, get_method
from graphpass.noise import NoiseTable
from graphpass.options import Options
from graphpass.plan import Decision, Plan, printable_shape
from graphpass.prediction import predict
from graphpass.pricing import Pricing
from graphpass.rewrite import Replacement
from graphpass.schedule import Schedule
from graphpass.selection import Selection, select
from graphpass.site import Gradient, Site

# How often doubtful prices are confirmed, and the choice is made again.
_CONFIRMED = 4


@dataclass(frozen=True, slots=True)
class _Rule:
    """One entry of the option `methods`: sites of a pattern, and the method they are to use."""

    pattern: str
    method: Method
    params: Any
    gradients: tuple[Gradient, ...]

    def covers(self, site: Site) -> bool:
        """Return whether the pattern matches the module of `site`."""
        return fnmatchcase(site.path, self.pattern) or fnmatchcase(site.name, self.pattern)


def make_plan(
    analysis: Analysis,
    options: Options,
    offset: int,
    modules: Collection[str] | None,
    noise: NoiseTable | None = None,
    pricing: Pricing | None = None,
) -> Plan:
    """Return the plan of one graph.

    Args:
        analysis: what the graph holds.
        options: what the user asked for.
        offset: number of layers in the graphs before this one.
        modules: paths of the model's modules that may hold products; None if not known.
        noise: what was measured of the graph's noise; None for a prior.
        pricing: prices of products; None for those of this machine.

    Raises:
        ConfigError: if a method or parameter is not legal, a pattern matches nothing, the
            given plan was made for another model, or the budget cannot be met.
    """
    given = options.resolved_plan()
    schedule = options.resolved_schedule()
    if given is not None and options.schedule is None:
        schedule = given.schedule
    plan = _named(analysis, options, given, schedule, offset, modules)
    if options.budget == 0:
        # Nothing is to be predicted, and nothing is to take time.
        return plan
    if pricing is None:
        pricing = prices.of(analysis, torch.get_num_threads(), options.replays)
    if given is not None or isinstance(options.methods, Mapping):
        planned = replacements(plan, analysis.sites)
        return replace(plan, prediction=predict(analysis, planned, pricing, noise))
    chosen = _select(analysis, options, schedule, offset, noise, pricing)
    plan = replace(plan, decisions=tuple(_chosen(chosen, analysis, offset)))
    planned = replacements(plan, analysis.sites)
    others = dict(zip((site.id for site in analysis.sites), chosen.others, strict=True))
    prediction = predict(analysis, planned, pricing, noise, chosen.frontier, others)
    return replace(plan, prediction=prediction)


def _named(
    analysis: Analysis,
    options: Options,
    given: Plan | None,
    schedule: Schedule,
    offset: int,
    modules: Collection[str] | None,
) -> Plan:
    """Return what the user decided: by a plan, by naming methods, by a budget of 0."""
    sites = analysis.sites
    if given is not None:
        followed = [_follow(given, site, options, schedule, offset) for site in sites]
        return Plan(tuple(followed), schedule, max(options.warmup_steps, given.warmup_steps))
    rules = _rules(options)
    _check_patterns(rules, sites, modules)
    decisions = [_decide(site, options, rules, schedule, offset) for site in sites]
    return Plan(tuple(decisions), schedule, options.warmup_steps)


def replacements(plan: Plan, sites: Sequence[Site]) -> tuple[Replacement, ...]:
    """Return what the plan approximates, with its records in place of names.

    Raises:
        ConfigError: if the plan names an unknown method or parameter.
    """
    by_id = {site.id: site for site in sites}
    return tuple(
        Replacement(by_id[decision.site], method, method.make_params(dict(decision.params)))
        for decision in plan.approximated
        for method in (get_method(decision.method),)
    )


def all_exact(plan: Plan, reason: str) -> Plan:
    """Return a plan with every approximation taken back, for the reason given."""
    decisions = tuple(
        decision
        if decision.method is None
        else replace(decision, method=None, params={}, reason=reason)
        for decision in plan.decisions
    )
    return replace(plan, decisions=decisions, prediction=None)


def _rules(options: Options) -> list[_Rule]:
    if not isinstance(options.methods, Mapping):
        for name in options.methods or ():
            get_method(name)
        return []
    return [
        _rule(pattern, spec)
        for pattern, specs in options.methods.items()
        for spec in (specs if isinstance(specs, list | tuple) and specs else (specs,))
    ]


def _rule(pattern: str, spec: object) -> _Rule:
    record = {"name": spec} if isinstance(spec, str) else spec
    if not isinstance(record, Mapping) or "name" not in record:
        raise ConfigError(
            f"methods[{pattern!r}]={spec!r}: give a method name, a mapping with 'name', "
            "'gradient' and the method's parameters, or a list of those"
        )
    params = {key: value for key, value in record.items() if key not in {"name", "gradient"}}
    method = get_method(record["name"])
    gradient = record.get("gradient", method.gradients[0].value)
    legal = [legal.value for legal in method.gradients]
    if gradient not in legal:
        raise ConfigError(
            f"methods[{pattern!r}]: gradient={gradient!r}; method {method.name!r} approximates "
            f"{' and '.join(legal)}"
        )
    return _Rule(pattern, method, method.make_params(params), (Gradient(gradient),))


def _check_patterns(
    rules: Sequence[_Rule], sites: Sequence[Site], modules: Collection[str] | None
) -> None:
    paths = {site.path for site in sites} | {site.name for site in sites} | set(modules or ())
    for rule in rules:
        if any(fnmatchcase(path, rule.pattern) for path in paths):
            continue
        if modules is None:
            # A function was compiled: what its other graphs hold cannot be known from here.
            continue
        near = get_close_matches(rule.pattern, sorted(paths), n=3, cutoff=0.3) or sorted(paths)[:3]
        raise ConfigError(
            f"methods: the pattern {rule.pattern!r} matches no convolution or matrix product of "
            f"the model; there are {len(paths)}, such as {', '.join(map(repr, near))}"
        )


def _decide(
    site: Site, options: Options, rules: Sequence[_Rule], schedule: Schedule, offset: int
) -> Decision:
    layer = site.layer + offset
    chosen = _choose(site, options, rules)
    if isinstance(chosen, Reason):
        return _exact(site, layer, Rejected(chosen))
    return _approximated(site, options, chosen, schedule, layer)


def _choose(site: Site, options: Options, rules: Sequence[_Rule]) -> _Rule | Reason:
    """Return the last rule that covers the site, or why there is none."""
    if options.budget == 0:
        return Reason.BUDGET_ZERO
    covering = [rule for rule in rules if rule.covers(site)]
    if site.gradient is Gradient.FORWARD and not any(map(_names_forward, covering)):
        return Reason.FORWARD
    if site.reason is not None:
        return site.reason
    if not covering:
        return Reason.NOT_NAMED
    fitting = [rule for rule in covering if site.gradient in rule.gradients]
    return fitting[-1] if fitting else Reason.NOT_THIS_GRADIENT


def _names_forward(rule: _Rule) -> bool:
    return Gradient.FORWARD in rule.gradients


def _approximated(
    site: Site, options: Options, rule: _Rule, schedule: Schedule, layer: int
) -> Decision:
    """Return the rule's decision, or an exact one where something stands against it."""
    rejected = _obstacle(site, options, rule, schedule, layer)
    if rejected is not None:
        return _exact(site, layer, rejected)
    name, params = rule.method.name, asdict(rule.params)
    return Decision(site.id, layer, site.op, printable_shape(site), name, params, "")


def _obstacle(
    site: Site, options: Options, rule: _Rule, schedule: Schedule, layer: int
) -> Rejected | None:
    return _forbidden(site, options, schedule, layer) or rule.method.reject(site, rule.params)


def _forbidden(site: Site, options: Options, schedule: Schedule, layer: int) -> Rejected | None:
    """Return why no method may approximate a site, or None."""
    # A forward product is approximated only where its name was given: that is permission enough.
    permitted = (*options.gradients, Gradient.FORWARD.value)
    if site.gradient.value not in permitted:
        return Rejected(Reason.NOT_IN_GRADIENTS)
    if not schedule.may_select(layer):
        return Rejected(Reason.NEVER_SCHEDULED, f"layer {layer} in schedule {schedule.name!r}")
    return None


def _select(
    analysis: Analysis,
    options: Options,
    schedule: Schedule,
    offset: int,
    noise: NoiseTable | None,
    pricing: Pricing,
) -> Selection:
    """Return what the planner chooses."""
    obstacles = {}
    for site in analysis.sites:
        obstacle = _forbidden(site, options, schedule, site.layer + offset)
        if site.gradient is Gradient.FORWARD and site.gradient.value not in options.gradients:
            obstacle = Rejected(Reason.FORWARD)
        elif site.reason is not None:
            obstacle = Rejected(site.reason)
        if obstacle is not None:
            obstacles[site.id] = obstacle
    rest_s = pricing.rest().seconds
    for last in (False,) * _CONFIRMED + (True,):
        found, propagation = menus(
            analysis, obstacles, options.methods, options.max_bias, noise, pricing
        )
        chosen = select(found, options.budget, options.max_bias, rest_s, propagation.noise_ratio)
        if last or not pricing.confirm(doubts(found, chosen.picks)):
            break
    return chosen


def _chosen(chosen: Selection, analysis: Analysis, offset: int) -> list[Decision]:
    decisions = []
    for site, pick, reason in zip(analysis.sites, chosen.picks, chosen.reasons, strict=True):
        layer = site.layer + offset
        if pick is None:
            assert reason is not None, site.id
            decisions.append(_exact(site, layer, reason))
            continue
        name, params, shape = pick.method.name, asdict(pick.params), printable_shape(site)
        decisions.append(Decision(site.id, layer, site.op, shape, name, params, ""))
    return decisions


def _follow(given: Plan, site: Site, options: Options, schedule: Schedule, offset: int) -> Decision:
    """Return the decision of a given plan, checked as if the user had named its method.

    Raises:
        ConfigError: if the plan's method cannot compute the site.
    """
    layer = site.layer + offset
    decision = given.find(site, layer)
    if options.budget == 0:
        return _exact(site, layer, Rejected(Reason.BUDGET_ZERO))
    if decision.method is None:
        return decision
    method = get_method(decision.method)
    if site.gradient not in method.gradients:
        legal = " and ".join(gradient.value for gradient in method.gradients)
        raise ConfigError(
            f"the plan has {site.id} computed by {method.name!r}, which approximates {legal} "
            "gradients; correct the plan, or make it again with graphpass.plan"
        )
    if site.reason is not None:
        return _exact(site, layer, Rejected(site.reason))
    rule = _Rule(site.path, method, method.make_params(dict(decision.params)), method.gradients)
    rejected = method.reject(site, rule.params)
    if rejected is not None and rejected.reason is Reason.UNSUPPORTED_SHAPE:
        raise ConfigError(
            f"the plan has {site.id} computed by {method.name!r}, which cannot: {rejected}; "
            "correct the plan, or make it again with graphpass.plan"
        )
    return _approximated(site, options, rule, schedule, layer)


def _exact(site: Site, layer: int, rejected: Rejected) -> Decision:
    shape = printable_shape(site)
    return Decision(site.id, layer, site.op, shape, None, {}, str(rejected))
