"""Tensors that a compiled graph keeps from one call to the next.

They are inputs of the graph that stay where they are, and are written in place:
`torch.ops.approx.recall(kept, after)` returns copies of them as they are once `after` was computed,
and `torch.ops.approx.remember(carrier, kept, values)` writes `values` into them and returns a copy
of `carrier`, which something must need.

Both are declared without side effects on purpose. What is said to change is made functional by
copies, or refused in the backward part of a graph. Nothing but `recall` may read what is kept: a
copy is the same wherever the compiler puts what is computed from it, and as the compiler does not
know these operations, it never runs one a second time. In the backward part `after` has to be
something that is computed there, or what is kept would be read in the forward part already, before
the backward pass of an earlier call has written it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import Library

_LIBRARY = Library("approx", "FRAGMENT")


def recall(kept: Sequence[Tensor], after: Tensor) -> list[Tensor]:
    """Return copies of what is kept."""
    del after
    return [tensor.clone() for tensor in kept]


def remember(carrier: Tensor, kept: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Write values into what is kept; return a copy of the carrier."""
    for tensor, value in zip(kept, values, strict=True):
        # Backward refuses inputs that were written to after forward: `data` counts its writes
        # apart.
        tensor.data.copy_(value)
    return carrier.clone()


def _fake_recall(kept: Sequence[Tensor], after: Tensor) -> list[Tensor]:
    del after
    return [torch.empty_like(tensor) for tensor in kept]


def _fake_remember(carrier: Tensor, kept: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    del kept, values
    return torch.empty_like(carrier)


for _schema, _function, _fake in (
    ("recall(Tensor[] kept, Tensor after) -> Tensor[]", recall, _fake_recall),
    (
        "remember(Tensor carrier, Tensor[] kept, Tensor[] values) -> Tensor",
        remember,
        _fake_remember,
    ),
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_function.__name__, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"approx::{_function.__name__}", _fake, lib=_LIBRARY)
