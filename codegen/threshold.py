"""A threshold that is kept: the k-th largest magnitude, found again only where that is due.

`torch.ops.approx.kept_threshold(values, stride, kept, old, due)` returns the magnitude that `kept`
of every `stride`-th value reach, where `due` is true, and `old` otherwise. On a CPU nothing is read
in that case. Elsewhere nobody waits to know: it is found in every call, and chosen from.
"""

import torch
from torch import Tensor
from torch.library import Library

_LIBRARY = Library("approx", "FRAGMENT")


def kept_threshold(values: Tensor, stride: int, kept: Tensor, old: Tensor, due: Tensor) -> Tensor:
    """Return the threshold.

    Args:
        values: any shape.
        stride: values from one that is looked at to the next.
        kept: how many of those are to reach the threshold, int64 0-d, at least 1.
        old: the threshold so far, 0-d.
        due: whether it is found again, bool 0-d.
    """
    if values.device.type != "cpu":
        return _without_waiting(values, stride, kept, old, due)
    if not bool(due):
        return old.clone()
    part = _part(values, stride)
    return part.kthvalue(part.shape[0] - int(kept) + 1).values.to(old.dtype)


def _without_waiting(values: Tensor, stride: int, kept: Tensor, old: Tensor, due: Tensor) -> Tensor:
    """Return the same without reading `kept` or `due` on the host."""
    part = _part(values, stride)
    found = part.sort().values.index_select(0, (part.shape[0] - kept).view(1))[0]
    return torch.where(due, found.to(old.dtype), old)


def _part(values: Tensor, stride: int) -> Tensor:
    return values.flatten()[::stride].abs()


def _fake(values: Tensor, stride: int, kept: Tensor, old: Tensor, due: Tensor) -> Tensor:
    del values, stride, kept, due
    return torch.empty_like(old)


_LIBRARY.define(
    "kept_threshold(Tensor values, int stride, Tensor kept, Tensor old, Tensor due) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("kept_threshold", kept_threshold, "CompositeExplicitAutograd")
torch.library.register_fake("approx::kept_threshold", _fake, lib=_LIBRARY)
