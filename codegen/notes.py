"""Numbers that a compiled graph leaves behind, beside what it returns.

`torch.ops.approx.leave_notes(carrier, notes, numbers, places)` returns a copy of `carrier`, which
something must need, such as the smallest gradient: so no compiler takes it for dead code. While it
runs it writes `numbers`, 0-d or 1-d, into `notes` from the given places on, and 1 into place 0.

It is declared without side effects on purpose. What is said to change is made functional by copies,
or refused in the backward part of a graph. Nothing in the graph reads `notes`, and each call gets
a tensor of its own, so there is no order that a compiler could break; if the operation runs twice,
it writes the same numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import Library

_LIBRARY = Library("approx", "FRAGMENT")


def leave_notes(
    carrier: Tensor, notes: Tensor, numbers: Sequence[Tensor], places: Sequence[int]
) -> Tensor:
    """Write numbers down, without waiting for them: see the module's text."""
    # Backward may run again, and refuses inputs that were written to in between: `data` counts its
    # writes apart.
    page = notes.data
    page[0] = 1.0
    for value, place in zip(numbers, places, strict=True):
        page[place : place + value.numel()] = value.reshape(-1)
    return carrier.clone()


def fresh(count: int, device: torch.device) -> Tensor:
    """Return what `count` numbers are noted in: float64, zero while nothing was."""
    return torch.zeros(count + 1, dtype=torch.float64, device=device)


class Reading:
    """Numbers on their way to the host: sent for at one time, looked at later."""

    def __init__(self, numbers: Tensor) -> None:
        """Begin to copy; wait for nothing."""
        self._numbers, self._event = numbers, None
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def values(self) -> list[float]:
        """Return the numbers, once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._numbers.tolist()
        return values


def _fake(
    carrier: Tensor, notes: Tensor, numbers: Sequence[Tensor], places: Sequence[int]
) -> Tensor:
    del notes, numbers, places
    return torch.empty_like(carrier)


_LIBRARY.define(
    "leave_notes(Tensor carrier, Tensor notes, Tensor[] numbers, int[] places) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("leave_notes", leave_notes, "CompositeExplicitAutograd")
torch.library.register_fake("approx::leave_notes", _fake, lib=_LIBRARY)
