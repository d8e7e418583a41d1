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
from graphpass.callers import Caller, Callers, device_of, first_parameter
from graphpass.capture import Analysis
from graphpass.dispatcher import Dispatcher
from graphpass.errors import ConfigError
from graphpass.options import Options
from graphpass.owner import Owner, find_owner
from graphpass.variants import EXACT, Active, Variants, copy_of, warn_once


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
    for key, value in settings.items():
        kind = config.get_type(key.replace("-", "_"))  # type: ignore[attr-defined]
        if isinstance(kind, type) and not isinstance(value, kind):
            raise ConfigError(f"inductor: {key}={value!r}; give a value of type {kind.__name__}")
    return {**(list_mode_options(options.mode) if options.mode else {}), **settings}


def _compile_training(
    gm: GraphModule, inputs: Sequence[Any], options: Options, patches: dict[str, Any]
) -> Callable[..., Any] | None:
    """Return the dispatcher of a training graph, or None where nothing is trained in it."""
    owner = _owner(gm, inputs)
    key, analysis = analyse(gm, inputs, owner, patches)
    if analysis is None:
        return None
    variants = Variants(gm, patches, parameters_of(inputs))
    callers = Callers(analysis, key, options, owner, inputs, variants)
    if not callers.first.plan.approximated:
        # In Inductor's own way, on Dynamo's own graph: nothing of ours is in it.
        variants.adopt_exact(compile_fx(gm, inputs, config_patches=patches or None))
    dispatcher = Dispatcher(
        variants,
        callers.choose,
        callers.remember,
        callers.failed,
        device=device_of(inputs),
        limit=options.max_variants,
        frozen=bool(analysis.hints) or any(isinstance(x, torch.SymInt) for x in inputs),
        strict=options.strict,
    )
    try:
        for active in _needed_at_once(callers.first, options, dispatcher.frozen):
            dispatcher.compile(active, inputs)
    except Exception as error:
        if analysis.remembered:
            # It may describe a graph that Inductor's settings have changed since: look again.
            memory.forget(key)
            callers.withdraw()
            return _compile_training(gm, inputs, options, patches)
        callers.give_up(f"an internal failure: {error}")
        raise
    callers.remember()

    return callers.shortcut(dispatcher)


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
    parameters = parameters_of(inputs)
    identity = (
        sorted(parameters),
        sorted(owner.prefixes.items()),
        # Passes go by their own identity: their `repr` holds an address.
        sorted(repr(item) for item in patches.items() if not hasattr(item[1], "uuid")),
        capture.UserPasses(patches).uuids(),
    )
    key = fingerprint.graph_digest(gm, identity)
    if capture.has_nested_regions(gm):
        return "", Analysis((), nested=True)
    analysis = memory.load(key)
    if analysis is not None:
        return key, analysis
    variants = Variants(gm, patches, parameters)
    analysis = capture.analyse(
        gm,
        lambda all_patches: variants.compile_raw(copy_of(gm), inputs, all_patches),
        patches,
        parameters,
        owner.path_of,
    )
    if analysis is not None:
        memory.store(key, analysis)
    return key, analysis


def parameters_of(inputs: Sequence[Any]) -> frozenset[int]:
    """Return the positions of the parameters among a graph's inputs."""
    return frozenset(i for i, x in enumerate(inputs) if isinstance(x, torch.nn.Parameter))


def _owner(gm: GraphModule, inputs: Sequence[Any]) -> Owner:
    first = first_parameter(inputs)
    return find_owner(gm, None if first is None else inputs[first])


def _needed_at_once(caller: Caller, options: Options, frozen: bool) -> list[Active]:
    """Return the variants to compile before the first step."""
    if frozen:
        return _all_variants(caller, options.max_variants)
    if not caller.training():
        return []
    return _first_variants(caller, options.max_variants)


def _first_variants(caller: Caller, limit: int) -> list[Active]:
    """Return the variants of the schedule's first period; others follow when their step comes."""
    schedule, step = caller.plan.schedule, caller.session.step
    period = schedule.landmarks(0)[: schedule.every_step]
    return list(dict.fromkeys(caller.at_step(step + i) for i in period))[:limit]


def _all_variants(caller: Caller, limit: int) -> list[Active]:
    """Return every variant: with symbolic sizes none can be compiled once training runs."""
    landmarks = caller.plan.schedule.landmarks(caller.plan.warmup_steps)
    everything = dict.fromkeys(map(caller.at_step, landmarks))
    return [EXACT, *[active for active in everything if active][:limit]]
