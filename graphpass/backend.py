"""The entry point of `torch.compile(model, backend="approx")`: capture, plan, compile, dispatch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.exc import ShortenTraceback
from torch._inductor import config, list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

from graphpass import capture, fingerprint, memory
from graphpass.capture import Analysis
from graphpass.errors import ConfigError
from graphpass.options import Options
from graphpass.owner import Owner, find_owner
from graphpass.plan import Plan
from graphpass.planner import make_plan, replacements
from graphpass.report import TrainingGraph, record
from graphpass.session import Session, session_of
from graphpass.variants import EXACT, Active, Dispatcher, Variants, copy_of, warn_once


class _VisibleConfigError(ConfigError, ShortenTraceback):
    """A `ConfigError` that Dynamo passes on to the user as it is."""

    def __init__(self, message: str) -> None:
        ShortenTraceback.__init__(self, message, first_useful_frame=None)
        self.message = message

    def __str__(self) -> str:
        """Return the message without the advice on debugging Dynamo that is added on the way."""
        return self.message


def approx(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a graph for approximate training.

    Graphs that train nothing are compiled as Inductor compiles them. So is everything when the
    plan is empty, or when something of ours fails: then with one warning, unless
    `options={"strict": True}`.

    Args:
        gm: the graph that Dynamo traced.
        example_inputs: what the graph is called with first.
        options: the fields of `graphpass.Options`.
        mode: Inductor mode.

    Raises:
        ConfigError: if an option is not legal, or does not fit the model.
    """
    with make_visible():
        return _compile(gm, example_inputs, Options.from_dict(options, mode))


@contextmanager
def make_visible() -> Iterator[None]:
    """Let a `ConfigError` through Dynamo, which wraps other exceptions of a backend.

    Raises:
        _VisibleConfigError: in place of a `ConfigError`, which it is as well.
    """
    try:
        yield
    except ConfigError as error:
        raise _VisibleConfigError(str(error)) from error


def _compile(gm: GraphModule, inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    patches = inductor_patches(options)
    needs_grad = any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
    if torch.is_grad_enabled() and needs_grad:
        try:
            compiled = _compile_training(gm, inputs, options, patches)
            if compiled is not None:
                return compiled
        except ConfigError:
            raise
        except Exception as error:
            if options.strict:
                raise
            warn_once(
                "an internal failure; the model is compiled exactly instead "
                f"({type(error).__name__}: {error})"
            )
    exact: Any = compile_fx(gm, inputs, config_patches=patches or None)
    result: Callable[..., Any] = exact
    return result


def inductor_patches(options: Options) -> dict[str, Any]:
    """Return the Inductor configuration that the user asked for.

    Raises:
        ConfigError: if the mode or a setting does not exist.
    """
    if options.mode is not None and options.mode not in list_mode_options():
        legal = ", ".join(list_mode_options())
        raise ConfigError(f"mode={options.mode!r}: legal are {legal}")
    settings = dict(options.inductor or {})
    unknown = sorted(
        key for key in settings if key.replace("-", "_") not in config.get_config_copy()
    )
    if unknown:
        raise ConfigError(
            f"inductor: there is no setting {', '.join(map(repr, unknown))}; "
            "torch._inductor.list_options() names them all"
        )
    return {**(list_mode_options(options.mode) if options.mode else {}), **settings}


def _compile_training(
    gm: GraphModule, inputs: Sequence[Any], options: Options, patches: dict[str, Any]
) -> Callable[..., Any] | None:
    """Return the dispatcher of a training graph, or None where all of it is exact."""
    owner = find_owner(gm)
    key, analysis = analyse(gm, inputs, owner, patches)
    if analysis is None:
        return None
    session = session_of(owner.model() if owner.model is not None else None)
    offset = session.layer_offset(owner.identity, analysis.layers)
    plan = make_plan(analysis.sites, options, offset, owner.product_modules())
    session.add_plan(owner.identity, plan)
    graph = record(analysis, plan, key)
    if not plan.approximated:
        return None
    return _dispatcher(gm, inputs, options, patches, owner, session, graph)


def analyse(
    gm: GraphModule, inputs: Sequence[Any], owner: Owner, patches: dict[str, Any]
) -> tuple[str, Analysis | None]:
    """Return the identity of a graph and what it holds (None: nothing is trained in it).

    Args:
        gm: the graph that Dynamo traced; not changed.
        inputs: its example inputs.
        owner: the model it belongs to.
        patches: Inductor configuration asked for by the user.
    """
    parameters = _parameters(inputs)
    identity = (
        sorted(parameters),
        sorted(owner.prefixes.items()),
        sorted(map(repr, patches.items())),
    )
    key = fingerprint.graph_digest(gm, identity)
    analysis = memory.load(key)
    if analysis is not None:
        return key, analysis
    variants = Variants(gm, patches, parameters)
    analysis = capture.analyse(
        gm,
        lambda more: variants.compile_raw(copy_of(gm), inputs, {**patches, **more}),
        parameters,
        owner.path_of,
    )
    if analysis is not None:
        memory.store(key, analysis)
    return key, analysis


def _parameters(inputs: Sequence[Any]) -> frozenset[int]:
    return frozenset(i for i, x in enumerate(inputs) if isinstance(x, torch.nn.Parameter))


def _dispatcher(
    gm: GraphModule,
    inputs: Sequence[Any],
    options: Options,
    patches: dict[str, Any],
    owner: Owner,
    session: Session,
    graph: TrainingGraph,
) -> Callable[..., Any]:
    """Compile the variants that are needed first, and return what picks one of them."""
    plan = graph.plan
    parameters = _parameters(inputs)
    planned = replacements(plan, graph.analysis.sites)
    variants = Variants(gm, patches, parameters, planned)
    first = min(parameters, default=None)
    device = inputs[first].device if first is not None else torch.device("cpu")
    layers = [decision.layer for decision in plan.approximated]

    def at_step(step: int) -> Active:
        if step < plan.warmup_steps:
            return EXACT
        return frozenset(i for i, n in enumerate(layers) if plan.schedule.selects(n, step))

    last: list[tuple[Active, int]] = [(EXACT, 0)]

    def choose(args: Sequence[Any]) -> tuple[Active, int]:
        if torch._C._current_graph_task_id() != -1:
            # A checkpoint outside the graph runs the forward again: it must see the same graph.
            return last[0]
        if not owner.training():
            return EXACT, 0
        caller = (owner.frame, id(args[first]) if first is not None else 0)
        turn = session.begin(caller, options.seed)
        last[0] = (EXACT if session.is_exact else at_step(turn.step), turn.seed)
        return last[0]

    symbolic = any(isinstance(value, torch.SymInt) for value in inputs) or bool(
        graph.analysis.hints
    )
    dispatcher = Dispatcher(
        variants, choose, device, options.max_variants, frozen=symbolic, strict=options.strict
    )
    graph.log = variants.log
    if symbolic:
        needed = _all_variants(at_step, plan, options.max_variants)
    elif owner.training():
        needed = _first_variants(at_step, plan, session.step, options.max_variants)
    else:
        needed = []
    for active in needed:
        variants.compile(active, inputs, dispatcher.seed_tensor(0))
    graph.remember()

    def dispatch(*args: Any) -> Any:
        return dispatcher(*args)

    return dispatch


def _first_variants(
    at_step: Callable[[int], Active], plan: Plan, step: int, limit: int
) -> list[Active]:
    """Return the variants of the schedule's first period; others follow when their step comes."""
    period = plan.schedule.landmarks(0)[: plan.schedule.every_step]
    return list(dict.fromkeys(at_step(step + i) for i in period))[:limit]


def _all_variants(at_step: Callable[[int], Active], plan: Plan, limit: int) -> list[Active]:
    """Return every variant: with symbolic sizes none can be compiled once training runs."""
    everything = dict.fromkeys(map(at_step, plan.schedule.landmarks(plan.warmup_steps)))
    return [EXACT, *[active for active in everything if active][:limit]]
