"""What a user may ask for: the same keys for `Options(...)` and `torch.compile(options=...)`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from graphpass.budget import Budget, check_bias, check_budget
from graphpass.errors import ConfigError
from graphpass.plan import Plan
from graphpass.schedule import Schedule

# What the planner may approximate: by itself, and where it is told to.
GRADIENTS = ("weight", "input")
PRODUCTS = (*GRADIENTS, "forward")

MethodSpec = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Options:
    """The validated options of one compilation.

    Attributes:
        budget: noise that may be added to the gradient, relative to the noise it has (tau); 0 means
            exact, bit for bit; "auto" is the least predicted time to the same loss, and never a
            plan that is predicted to gain less than 2 %; or a `Speedup` or an `AccuracyDrop`.
        methods: None, a list of method names that the planner may use, or a mapping that takes its
            place, from a module pattern (fnmatch on the module path) to a method name or a record
            such as `{"name": "topk", "k": 2, "gradient": "weight"}`, or a list of those for
            different products. Later patterns win. Forward products are approximated only where a
            record says `"gradient": "forward"`: what they lose, the loss and every gradient lose.
        gradients: the products that may be approximated, out of "weight", "input" and "forward".
            With "forward" the planner may choose methods for forward products too, within
            `max_bias`, as their errors make every gradient a biased one.
        max_bias: squared bias that the planner may add with biased methods, relative to the squared
            gradient; 0 leaves them to those who name them in a mapping.
        schedule: a `Schedule` or the name of one; None applies every planned method on every step.
        plan: a `Plan`, or the path of a plan file, to use instead of planning.
        seed: seed of every random draw, in [0, 2**31).
        probe_every: steps from one measurement of the noise to the next.
        decay_budget: whether a budget that is a number falls with the learning rate, in proportion
            to the largest so far; `Session.follow` tells it which optimizer to look at.
        warmup_steps: number of first steps that are exact.
        total_steps: length of the training run in steps, for schedules that end relative to it.
        inductor: Inductor configuration patches, as `torch.compile(options=...)` takes them.
        mode: Inductor mode, such as "max-autotune".
        strict: raise on an internal failure, instead of compiling the exact graph with a warning.
        max_variants: most compiled variants of one graph that may be alive.
    """

    budget: Budget = "auto"
    methods: Mapping[str, MethodSpec] | Sequence[str] | None = None
    gradients: Sequence[str] = GRADIENTS
    max_bias: float = 0.0
    schedule: Schedule | str | None = None
    plan: Plan | str | Path | None = None
    seed: int = 0
    probe_every: int = 500
    decay_budget: bool = False
    warmup_steps: int = 0
    total_steps: int | None = None
    inductor: Mapping[str, Any] | None = None
    mode: str | None = None
    strict: bool = False
    max_variants: int = 8

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ConfigError: if a value is not legal.
        """
        check_budget(self.budget)
        check_bias(self.max_bias)
        _check_gradients(self.gradients)
        _check_methods(self.methods)
        _check_integer("seed", self.seed, 0, 2**31 - 1)
        _check_integer("probe_every", self.probe_every, 1, None)
        _check_integer("warmup_steps", self.warmup_steps, 0, None)
        _check_integer("max_variants", self.max_variants, 1, None)
        if self.total_steps is not None:
            _check_integer("total_steps", self.total_steps, 1, None)
        for name in ("strict", "decay_budget"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: give True or False")
        _check_inductor(self.inductor, self.mode)
        if self.plan is not None and not isinstance(self.plan, (Plan, str, Path)):
            raise ConfigError(f"plan={self.plan!r}: give a Plan or the path of a plan file")
        if self.plan is not None and self.methods is not None:
            raise ConfigError("both plan and methods were given: a plan already names its methods")
        self.resolved_schedule()

    @property
    def replays(self) -> bool:
        """Whether Inductor records steps as CUDA graphs, which take no time of the host."""
        default = self.mode in ("reduce-overhead", "max-autotune")
        return bool((self.inductor or {}).get("triton.cudagraphs", default))

    @classmethod
    def from_dict(cls, given: Mapping[str, Any] | None, mode: str | None = None) -> "Options":
        """Return the options that `torch.compile(mode=..., options=...)` was given.

        Raises:
            ConfigError: if this is no mapping, a key is unknown, or a value is not legal.
        """
        if given is not None and not isinstance(given, Mapping):
            raise ConfigError(f"options={given!r}: give a mapping from option to value")
        given = dict(given or {})
        legal = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(legal), key=repr)
        if unknown:
            raise ConfigError(
                f"unknown option {', '.join(map(repr, unknown))}: legal are {', '.join(legal)} "
                "(settings of Inductor go into the option 'inductor')"
            )
        if mode is not None:
            given.setdefault("mode", mode)
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Return what `torch.compile(options=...)` takes, without the values left at default."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }

    def resolved_schedule(self) -> Schedule:
        """Return the schedule as a record.

        Raises:
            ConfigError: if the name is unknown or the schedule needs `total_steps`.
        """
        if isinstance(self.schedule, Schedule):
            return self.schedule
        if self.schedule is None:
            return Schedule.named("always")
        if isinstance(self.schedule, str):
            return Schedule.named(self.schedule, self.total_steps)
        raise ConfigError(f"schedule={self.schedule!r}: give a Schedule or the name of one")

    def resolved_plan(self) -> Plan | None:
        """Return the plan as a record, read from its file where a path was given.

        Raises:
            ConfigError: if the file is missing, corrupt or newer than this version.
        """
        if isinstance(self.plan, (str, Path)):
            return Plan.load(self.plan)
        return self.plan


def _check_gradients(gradients: object) -> None:
    names = list(gradients) if isinstance(gradients, (list, tuple)) else []
    legal = all(isinstance(name, str) and name in PRODUCTS for name in names)
    if not names or not legal or len(set(names)) < len(names):
        raise ConfigError(f"gradients={gradients!r}: give one or more of {', '.join(PRODUCTS)}")


def _check_methods(methods: object) -> None:
    if methods is None:
        return
    if isinstance(methods, Mapping):
        for pattern in methods:
            if not isinstance(pattern, str) or not pattern:
                raise ConfigError(f"methods: {pattern!r} is no module pattern; give a string")
        return
    if not isinstance(methods, (list, tuple)) or not all(isinstance(name, str) for name in methods):
        raise ConfigError(
            f"methods={methods!r}: give None, a list of method names, or a mapping from module "
            "pattern to method"
        )


def _check_inductor(inductor: object, mode: object) -> None:
    # Types alone: which settings and modes exist is known where the model is compiled.
    if inductor is not None and not isinstance(inductor, Mapping):
        raise ConfigError(f"inductor={inductor!r}: give a mapping of Inductor settings")
    for key in inductor or ():
        if not isinstance(key, str):
            raise ConfigError(f"inductor: {key!r} is no setting; give its name, a string")
    if mode is not None and not isinstance(mode, str):
        raise ConfigError(f'mode={mode!r}: give the name of a mode, such as "max-autotune"')


def _check_integer(name: str, value: object, low: int, high: int | None) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):  # type: ignore[operator]
        limit = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise ConfigError(f"{name}={value!r}: give an integer {limit}")
