"""The three outcomes that this project never mixes.

* The user's mistake raises `ConfigError`: what was given, what is legal, what to do.
* "Not applicable" is a value, `Rejected`: a named reason that ends up in the report.
* Our own bug is loud: `RewriteError`, or a plain assertion.
"""

from dataclasses import dataclass
from enum import StrEnum


class ApproxError(Exception):
    """Base of every exception that this project raises on purpose."""


class ConfigError(ApproxError, ValueError):
    """The user gave something that is not legal; the message says what is."""


class RewriteError(ApproxError, RuntimeError):
    """A bug of ours: the rewritten graph is not what the plan asked for."""


class Reason(StrEnum):
    """Why a product is computed exactly."""

    NOT_NAMED = "not named by `methods`"
    BUDGET_ZERO = "the budget is 0"
    BIASED = "biased, and `max_bias` is 0"
    NOISE_UNKNOWN = "its noise is not known before it is measured"
    NO_CANDIDATE = "planner: no method can be used"
    NO_GAIN = "planner: nothing saves time"
    NOISE_TOO_DEAR = "planner: noise too dear"
    SMALL_GAIN = "planner: too little to gain in all"
    NOT_THIS_GRADIENT = "the method does not approximate this product"
    NOT_IN_GRADIENTS = "`gradients` leaves this product out"
    FORWARD = "forward products stay exact unless a method is named, or the planner may choose"
    FUSED = "part of a fused attention kernel"
    NO_COUNTERPART = "no forward product belongs to this one"
    UNSUPPORTED_DTYPE = "not a floating-point product"
    UNSUPPORTED_SHAPE = "the method has no form for this shape"
    NO_HARDWARE = "the device has no such arithmetic"
    NOT_CHEAPER = "the method would do no less work than the exact product"
    NO_FEEDBACK = "only weight gradients have error feedback"
    NEVER_SCHEDULED = "the schedule never selects this layer"
    GIVEN_PLAN = "the plan was given, and is not changed"
    DYNAMIC_SIZES = "sizes are dynamic: nothing can be compiled once training runs"
    NO_WEIGHTS = "no product of the graph is a weight gradient"
    NOTHING_PAYS = "no approximation saves time enough"
    OVER_BUDGET = "measured noise stays over the budget"
    NESTED_REGION = "the graph has control flow or nested regions"


@dataclass(frozen=True, slots=True)
class Rejected:
    """A site that stays exact, and why.

    Attributes:
        reason: the kind of obstacle.
        detail: figures that make the reason concrete; may be empty.
    """

    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        """Return the text shown in a report row."""
        return f"{self.reason.value}: {self.detail}" if self.detail else self.reason.value
