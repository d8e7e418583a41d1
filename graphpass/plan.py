"""A plan: for every product of a model, how it is computed, and on which steps.

A plan is a record without any behaviour. It can be kept in a file, edited, and used for another
run of the same model.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from graphpass.errors import ConfigError
from graphpass.prediction import Prediction, joined
from graphpass.schedule import Schedule
from graphpass.site import Site

# Since 2 with a prediction.
PLAN_VERSION = 2
ALWAYS = Schedule()
# What reading a record that holds something else may raise.
_CORRUPT = (
    KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Decision:
    """How one site is computed.

    Attributes:
        site: name of the site, such as "layer2.0.conv1:weight".
        layer: number of the layer over all graphs of the model, from 1.
        op: kind of product.
        output: shape of the product; symbolic sizes by name.
        method: name of the method; None for exact.
        params: parameters of the method.
        reason: why the site stays exact; "" otherwise.
    """

    site: str
    layer: int
    op: str
    output: tuple[int | str, ...]
    method: str | None
    params: Mapping[str, Any]
    reason: str

    def __hash__(self) -> int:
        """Hash what identifies the decision; mappings have no hash of their own."""
        return hash((self.site, self.method))


@dataclass(frozen=True, slots=True)
class Plan:
    """A decision for every site, and the schedule that says when it applies.

    Attributes:
        decisions: one a site, in the order of the graphs.
        schedule: which layers are approximated on which step.
        warmup_steps: number of first steps that are exact.
        prediction: what it is predicted to do; None where nothing was predicted. Plans that decide
            the same are equal, whatever is predicted of them.
    """

    decisions: tuple[Decision, ...] = ()
    schedule: Schedule = ALWAYS
    warmup_steps: int = 0
    prediction: Prediction | None = field(default=None, compare=False)

    @property
    def approximated(self) -> tuple[Decision, ...]:
        """The decisions that name a method."""
        return tuple(decision for decision in self.decisions if decision.method is not None)

    @property
    def digest(self) -> str:
        """Hash of everything that is planned."""
        return hashlib.sha256(self._json(self.schedule.to_dict()).encode()).hexdigest()[:16]

    @classmethod
    def joined(cls, plans: "Sequence[Plan]") -> "Plan":
        """Return one plan of all graphs of a model, under the schedule of the first."""
        if not plans:
            return cls()
        decisions = tuple(decision for plan in plans for decision in plan.decisions)
        known = [plan.prediction for plan in plans if plan.prediction is not None]
        prediction = joined(known) if len(known) == len(plans) else None
        return cls(decisions, plans[0].schedule, plans[0].warmup_steps, prediction)

    def find(self, site: Site, layer: int) -> Decision:
        """Return the decision for a site of the model that this plan was made for.

        Raises:
            ConfigError: if the plan was made for another model.
        """
        output = printable_shape(site)
        for decision in self.decisions:
            if decision.site != site.id:
                continue
            same = decision.op == site.op and len(decision.output) == len(output)
            if site.gradient == "weight":
                same = same and decision.output == output
            if not same or decision.layer != layer:
                raise ConfigError(
                    f"the plan was made for another model: it has {site.id} as {decision.op} "
                    f"{list(decision.output)}, layer {decision.layer}; this model has {site.op} "
                    f"{list(output)}, layer {layer}. Make a plan for this model "
                    "with graphpass.plan(model, *inputs)"
                )
            return decision
        raise ConfigError(
            f"the plan was made for another model: it does not have the product {site.id}. "
            "Make a plan for this model with graphpass.plan(model, *inputs)"
        )

    def to_json(self) -> str:
        """Return the plan as JSON, which `from_json` reads.

        Raises:
            ConfigError: if the schedule is a function, which a file cannot hold.
        """
        if self.schedule.rule is not None:
            raise ConfigError(
                "a schedule that is a function cannot be saved: save "
                "dataclasses.replace(plan, schedule=graphpass.Schedule()), and give the option "
                "'schedule' together with the plan"
            )
        record = self.schedule.to_dict()
        del record["rule"]
        prediction = None if self.prediction is None else self.prediction.to_dict()
        return self._json(record, prediction=prediction)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Return the plan that `to_json` wrote.

        Raises:
            ConfigError: if the text is corrupt, or was written by a newer version.
        """
        try:
            record = json.loads(text)
            version = record["version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"this is not a plan: {_what(error)}. {_REMEDY}") from error
        if not _is_integer(version, 1) or version > PLAN_VERSION:
            raise ConfigError(
                f"the plan has format {version!r}; this version reads up to {PLAN_VERSION}: "
                "update graphpass, or make the plan again with graphpass.plan"
            )
        try:
            return _plan(record)
        except _CORRUPT as error:
            raise ConfigError(f"the plan is corrupt: {_what(error)}. {_REMEDY}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan to a file, whole or not at all."""
        from codegen.cache import write_atomically

        write_atomically(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Return the plan kept in a file.

        Raises:
            ConfigError: if the file cannot be read, is corrupt, or was written by a newer version.
        """
        try:
            text = Path(path).read_text()
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the plan {str(path)!r}: {_what(error)}") from error
        try:
            return cls.from_json(text)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def to_html(self, path: str | Path) -> None:
        """Write the plan as one HTML page, whole or not at all."""
        from codegen.cache import write_atomically
        from graphpass.pages import plan_html

        write_atomically(Path(path), plan_html(self))

    def __str__(self) -> str:
        """Return a table of the plan, and what is predicted of it."""
        from graphpass.render import plan_table

        return plan_table(self)

    def _json(self, schedule: dict[str, Any], **more: Any) -> str:
        decisions = [asdict(decision) for decision in self.decisions]
        record = {
            "version": PLAN_VERSION,
            "schedule": schedule,
            "warmup_steps": self.warmup_steps,
            "decisions": decisions,
            **more,
        }
        return json.dumps(record, indent=1, sort_keys=True)


_REMEDY = "Make it again with graphpass.plan(model, *inputs).save(path)"


def printable_shape(site: Site) -> tuple[int | str, ...]:
    """Return the shape of a site's product, symbolic sizes by name."""
    return tuple(size if isinstance(size, int) else str(size) for size in site.output)


def _plan(record: Mapping[str, Any]) -> Plan:
    warmup_steps = _value(record, "warmup_steps", lambda steps: _is_integer(steps, 0))
    decisions = tuple(map(_decision, _value(record, "decisions", _is_list_of(dict))))
    counts = Counter(decision.site for decision in decisions)
    if twice := sorted(site for site, count in counts.items() if count > 1):
        raise ValueError(f"it has {twice[0]!r} more than once")
    schedule = Schedule(**_value(record, "schedule", _is(dict)))
    predicted = _value({"prediction": None, **record}, "prediction", _is(dict, type(None)))
    prediction = None if predicted is None else Prediction.from_dict(predicted)
    return Plan(decisions, schedule, warmup_steps, prediction)


def _decision(record: Mapping[str, Any]) -> Decision:
    return Decision(
        site=_value(record, "site", lambda site: isinstance(site, str) and site != ""),
        layer=_value(record, "layer", lambda layer: _is_integer(layer, 1)),
        op=_value(record, "op", _is(str)),
        output=tuple(_value(record, "output", _is_list_of(int, str))),
        method=_value(record, "method", _is(str, type(None))),
        params=dict(_value(record, "params", _is(dict))),
        reason=_value(record, "reason", _is(str)),
    )


def _value(record: Mapping[str, Any], key: str, is_legal: Callable[[Any], bool]) -> Any:
    # The value as it is: one that would have to be converted is refused.
    value = record[key]
    if not is_legal(value):
        raise TypeError(f"{key} is {value!r}")
    return value


def _is(*types: type[object]) -> Callable[[Any], bool]:
    # No field is a truth value, though every truth value is an integer.
    return lambda value: isinstance(value, types) and not isinstance(value, bool)


def _is_list_of(*types: type[object]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(_is(*types), value))


def _is_integer(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _what(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
