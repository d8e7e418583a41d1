"""Which layers are approximated on which step.

A schedule is a rule `(layer, step) -> bool`. Layers are numbered from 1 in the order of the
forward pass (convolutions and matrix products with a weight), steps from 0. The named schedules
`ga-1`, `ga-2`, `ga-3` and `ga-cnn2` are those of Wang, Nelaturu and Amarasinghe, "Accelerated CNN
Training Through Gradient Approximation", 2019, sections 3 and 3.3: each approximates a quarter of
all (layer, step) pairs (`ga-cnn2`: half of the steps of the second layer), and never layer 1.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

from graphpass.errors import ConfigError

# A rule given as a function may have any period: look this far ahead for the variants it needs.
_LOOK_AHEAD_STEPS = 64


@dataclass(frozen=True, slots=True)
class Schedule:
    """A rule that says for (layer, step) whether the planned method applies.

    A layer is selected when it is `first_layer`, or any `every_layer`-th after it up to
    `last_layer`; a step when its number is `phase` modulo `every_step`, not before `start` and
    before `stop`. `rule`, where given, must agree as well.

    Attributes:
        name: shown in reports.
        every_layer: distance between selected layers.
        first_layer: number of the first selected layer, from 1.
        last_layer: number of the last layer that may be selected; None for no limit.
        every_step: distance between selected steps.
        phase: remainder of the selected steps, below `every_step`.
        start: first step that may be selected.
        stop: first step that may not be selected any more; None for never.
        rule: any function of (layer, step).
    """

    name: str = "always"
    every_layer: int = 1
    first_layer: int = 1
    last_layer: int | None = None
    every_step: int = 1
    phase: int = 0
    start: int = 0
    stop: int | None = None
    rule: Callable[[int, int], bool] | None = None

    def __post_init__(self) -> None:
        """Check that the schedule is possible.

        Raises:
            ConfigError: if a value has the wrong type or is out of range, or nothing could ever be
                selected.
        """
        self._check_types()
        if not _is_integer(self.phase) or not 0 <= self.phase < self.every_step:
            raise ConfigError(
                f"schedule: phase={self.phase!r}; give an integer from 0 to every_step - 1 = "
                f"{self.every_step - 1}"
            )
        if self.last_layer is not None and self.last_layer < self.first_layer:
            raise ConfigError(
                f"schedule: last_layer={self.last_layer} comes before "
                f"first_layer={self.first_layer}, so no layer could be selected"
            )
        if self.stop is not None and self.stop <= self.start:
            raise ConfigError(
                f"schedule: stop={self.stop} is not after start={self.start}, so no step could be "
                "selected; leave both out for an approximation on every step"
            )

    def _check_types(self) -> None:
        if not isinstance(self.name, str):
            raise ConfigError(f"schedule: name={self.name!r}; give a string")
        for name, low in (("every_layer", 1), ("first_layer", 1), ("every_step", 1), ("start", 0)):
            value = getattr(self, name)
            if not _is_integer(value) or value < low:
                raise ConfigError(f"schedule: {name}={value!r}; give an integer of at least {low}")
        for name in ("last_layer", "stop"):
            value = getattr(self, name)
            if value is not None and not _is_integer(value):
                raise ConfigError(f"schedule: {name}={value!r}; give an integer or None")
        if self.rule is not None and not callable(self.rule):
            raise ConfigError(f"schedule: rule={self.rule!r}; give a function of (layer, step)")

    def selects(self, layer: int, step: int) -> bool:
        """Return whether the method planned for `layer` applies on `step`.

        Raises:
            ConfigError: if the rule is a function and returns something other than a bool.
        """
        if step < self.start or (self.stop is not None and step >= self.stop):
            return False
        if step % self.every_step != self.phase or not self.may_select(layer):
            return False
        if self.rule is None:
            return True
        answer = self.rule(layer, step)
        if not isinstance(answer, bool):
            raise ConfigError(
                f"schedule {self.name!r}: the rule returned {answer!r} for layer {layer}, "
                f"step {step}; return True or False"
            )
        return answer

    def may_select(self, layer: int) -> bool:
        """Return whether `layer` is selected on any step (as far as can be said in advance)."""
        if layer < self.first_layer or (self.last_layer is not None and layer > self.last_layer):
            return False
        return (layer - self.first_layer) % self.every_layer == 0

    def landmarks(self, warmup_steps: int) -> tuple[int, ...]:
        """Return steps that show every combination of layers that this schedule can select.

        Complete for schedules without `rule`; for a function, the first 64 steps are looked at.
        """
        period = self.every_step if self.rule is None else _LOOK_AHEAD_STEPS
        starts = {0, warmup_steps, max(self.start, warmup_steps)}
        if self.stop is not None:
            starts |= {max(self.stop - period, 0), self.stop}
        return tuple(sorted({first + i for first in starts for i in range(period)}))

    def picture(self, layers: Iterable[tuple[int, str]], warmup_steps: int, steps: int = 24) -> str:
        """Return a drawing of layers by steps; `#` marks an approximated layer.

        Args:
            layers: number and label of each planned layer, in order.
            warmup_steps: number of first steps that are exact.
            steps: number of steps drawn.
        """
        rows = list(layers)
        width = max((len(label) for _, label in rows), default=0)
        lines = [f"{'':{width}}  steps 0 to {steps - 1}, # = approximated"]
        for layer, label in rows:
            cells = (step >= warmup_steps and self.selects(layer, step) for step in range(steps))
            lines.append(f"{label:{width}}  " + "".join("#" if cell else "." for cell in cells))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able record; a function is represented by its name alone."""
        record = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.rule is not None:
            # A callable object, such as a partial, has no name of its own: its type has.
            named: Any = self.rule if hasattr(self.rule, "__qualname__") else type(self.rule)
            record["rule"] = f"{getattr(named, '__module__', None)}:{named.__qualname__}"
        return record

    @classmethod
    def named(cls, name: str, total_steps: int | None = None) -> "Schedule":
        """Return the schedule called `name`.

        Args:
            name: a name of `SCHEDULES`, or "exact-tail:F" (the last fraction F of the run exact,
                rounded up to whole steps).
            total_steps: length of the run in steps; needed by "exact-tail:F".

        Raises:
            ConfigError: if the name is unknown, `total_steps` is missing, or no step is left.
        """
        if name in SCHEDULES:
            return SCHEDULES[name]
        tail = re.fullmatch(r"exact-tail:([0-9.]+)", name)
        if tail is None:
            raise ConfigError(
                f"schedule={name!r}: legal are {', '.join(SCHEDULES)}, 'exact-tail:F' with a "
                "fraction F, or a graphpass.Schedule"
            )
        return _exact_tail(name, tail.group(1), total_steps)

    @classmethod
    def until(cls, step: int) -> "Schedule":
        """Return the schedule that approximates before `step` and is exact from it on."""
        return cls(name=f"until {step}", stop=step)

    @classmethod
    def after(cls, step: int) -> "Schedule":
        """Return the schedule that is exact before `step` and approximates from it on."""
        return cls(name=f"after {step}", start=step)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _exact_tail(name: str, fraction_text: str, total_steps: int | None) -> Schedule:
    try:
        # Not a float: 0.07 of 100 steps are 7 steps, and not a rounding error more.
        fraction = Fraction(fraction_text)
    except ValueError:
        fraction = Fraction(-1)
    if not 0 < fraction < 1:
        raise ConfigError(f"schedule={name!r}: the fraction must lie between 0 and 1, such as 0.1")
    if total_steps is None:
        raise ConfigError(
            f"schedule={name!r} needs the length of the run: add the option total_steps"
        )
    stop = total_steps - max(1, math.ceil(total_steps * fraction))
    if stop < 1:
        raise ConfigError(f"schedule={name!r}: nothing is left of {total_steps} steps")
    return Schedule(name=name, stop=stop)


SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule(),
        # Every fourth layer from the second, every step.
        Schedule("ga-1", every_layer=4, first_layer=2),
        # Every other layer, every other step.
        Schedule("ga-2", every_layer=2, first_layer=2, every_step=2, phase=1),
        # Every layer but the first, every fourth step.
        Schedule("ga-3", first_layer=2, every_step=4, phase=3),
        # The two-layer network: the second convolution, every other step.
        Schedule("ga-cnn2", first_layer=2, last_layer=2, every_step=2, phase=1),
    )
}
