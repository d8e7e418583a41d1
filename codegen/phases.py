"""Phases of output pixels: every `down`-th row of a map, and every `across`-th pixel of such a row.

The pixels (h, w) of a map fall into down * across phases, (h mod down) * across + w mod across. A
sample b takes its pixels of a given phase, or, staggered, of the phase that is b further on.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def largest(size: Sequence[Any], down: int, across: int) -> tuple[Any, Any]:
    """Return rows and columns of the largest phase of maps of a size, which may be symbolic."""
    return -(-size[0] // down), -(-size[1] // across)


def pixels(
    shape: list[int], phase: Tensor, down: int, across: int, staggered: bool
) -> tuple[Tensor, Tensor]:
    """Return flat numbers of the pixels of a phase, and which of them exist: [R], twice.

    Where the map ends within a step, the last phases are smaller: R is that of the largest.

    Args:
        shape: of the output gradient, [B, Co, OH, OW].
        phase: int64 [1].
        down: every how many rows of the map.
        across: every how many pixels of a row.
        staggered: whether neighbouring samples use different phases.
    """
    batch, _, height, width = shape
    device = phase.device
    sample = torch.arange(batch, device=device)[:, None, None]
    if staggered:
        phase = (phase + sample) % (down * across)
    rows, columns = largest([height, width], down, across)
    h = torch.arange(rows, device=device)[:, None] * down + phase // across
    w = torch.arange(columns, device=device) * across + phase % across
    inside = (h < height) & (w < width)
    index = (sample * height + h.clamp(max=height - 1)) * width + w.clamp(max=width - 1)
    return index.flatten(), inside.expand(batch, rows, columns).flatten()
