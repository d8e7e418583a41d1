"""What a method keeps of a site from step to step, as the method sees it.

A method declares slots; each call gets a `State` with their values, and the last thing it does with
one is to write new values. The tensors live in the session (`graphpass.keeping`) and are inputs of
the compiled graph, so that they change without anything being compiled again.

A step may have several calls (gradient accumulation), and a forward product may be computed again
for backward: what a forward product keeps has to come out the same then.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import codegen.state  # noqa: F401  (registers the operators below)

if TYPE_CHECKING:
    from graphpass.site import Site


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor that is kept.

    Attributes:
        name: what the method calls it.
        shape: sizes, none of which may change from call to call; () for a number.
        dtype: element type.
        initial: its values before the first call.
    """

    name: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    initial: float = 0.0

    def fresh(self, device: torch.device) -> Tensor:
        """Return the tensor as it is before the first call."""
        return torch.full(self.shape, self.initial, dtype=self.dtype, device=device)


class State:
    """The state of one site in one call.

    Attributes:
        step: the session's step, int64 0-d.
        before: what is kept, by slot, as it was before this call.
    """

    def __init__(self, step: Tensor, kept: Mapping[str, Tensor], after: Tensor) -> None:
        """Read what is kept.

        Args:
            step: int64 0-d.
            kept: the tensors by the names of their slots.
            after: an operand of the product; reading waits until it was computed.
        """
        self.step = step
        self._kept = dict(kept)
        values = torch.ops.approx.recall(list(kept.values()), after) if kept else []
        self.before: dict[str, Tensor] = dict(zip(kept, values, strict=True))

    @classmethod
    def fresh(cls, slots: Sequence[Slot], step: Tensor) -> "State":
        """Return the state of a first call."""
        return cls(step, {slot.name: slot.fresh(step.device) for slot in slots}, step)

    def at(self, step: Tensor) -> "State":
        """Return the state in which this one's call leaves the next one."""
        return State(step, self._kept, step)

    def write(self, carrier: Tensor, **values: Tensor) -> Tensor:
        """Keep other values from now on.

        Args:
            carrier: something that the product is computed from, or the product itself.
            **values: by the name of the slot.

        Returns:
            The carrier, to go on with in its place: values are written while it is computed.
        """
        kept = [self._kept[name] for name in values]
        result: Tensor = torch.ops.approx.remember(carrier, kept, list(values.values()))
        return result


@dataclass(frozen=True, slots=True)
class SiteState:
    """What is kept of one site, between two steps.

    Attributes:
        site: the product.
        params: parameters of the method that computes it.
        kept: the tensors by the names of their slots; written to in place.
    """

    site: "Site"
    params: Any
    kept: Mapping[str, Tensor]


def no_state(site: "Site", params: Any) -> tuple[Slot, ...]:
    """Keep nothing: the state of most methods."""
    del site, params
    return ()


def with_state(function: Callable[..., Tensor], state: State | None) -> Callable[..., Tensor]:
    """Return a method's reference or lowering, with its state if it has one."""
    return partial(function, state=state) if state is not None and state.before else function
