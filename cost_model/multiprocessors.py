"""What a GPU's multiprocessors and its cache add to a roofline: whole tiles, and many readers.

A product [M, K] @ [K, N] is cut into tiles of the result; a multiprocessor has one at a time, so
all take as long as the one with most of them: 133 tiles on 132 multiprocessors take twice as long
as 132. And each tile reads its own rows and columns, from the cache where others have read them.
Where there are few tiles, as for weight gradients, what is contracted is shared out, too. Of a few
usual tiles the fastest counts, as a library that is any good would choose.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import ceil

from cost_model.figure import Figure

# Rows and columns of a tile.
_SIDES = (32, 64, 128, 256)
# A result of one multiprocessor is at most so large: its registers hold it.
_LARGEST = 128 * 256
# Programs that share what is contracted for a tile.
_SPLITS = (1, 2, 4, 8, 16, 32, 64, 128)
_ITEM_BYTES = {"int8": 1, "float8": 1, "bfloat16": 2, "float16": 2}
# What layers are described by: see `of_kernel`.
_SIZES = ("in", "out", "groups", "rows", "taps")


@dataclass(frozen=True, slots=True)
class Multiprocessors:
    """What a GPU shares work out among, and reads it through.

    Attributes:
        count: how many there are.
        cache_bytes: of the last cache before memory.
        cache_bytes_per_s: what all of them together read from it.
    """

    count: Figure
    cache_bytes: Figure
    cache_bytes_per_s: Figure

    def product_s(
        self, rows: float, columns: float, contracted: float, groups: float, dtype: str, peak: float
    ) -> float:
        """Return the least seconds of a product that is cut into tiles.

        Args:
            rows: of the result of a group.
            columns: of the result of a group.
            contracted: length of its sums.
            groups: how many such products.
            dtype: element type that it computes in.
            peak: FLOP/s of all multiprocessors in that type.
        """
        own_peak = peak / self.count.value
        own_bytes_per_s = self.cache_bytes_per_s.value / self.count.value
        item_bytes = _ITEM_BYTES.get(dtype, 4)

        def tiled_s(high: int, wide: int, splits: int) -> float:
            tiles = ceil(rows / high) * ceil(columns / wide) * ceil(groups) * splits
            step = max(2 * high * wide / own_peak, (high + wide) * item_bytes / own_bytes_per_s)
            return ceil(tiles / self.count.value) * ceil(contracted / splits) * step

        return min(
            tiled_s(high, wide, splits)
            for high, wide, splits in product(_SIDES, _SIDES, _SPLITS)
            if high * wide <= _LARGEST and splits <= max(1, contracted / 64)
        )

    def of_kernel(self, kind: str, sizes: Mapping[str, float], dtype: str, peak: float) -> float:
        """Return the same for a kernel of a layer; 0 for one that is no product.

        Args:
            kind: of the kernel; which product it is, is part of it.
            sizes: channels `in` and `out` of a group, `groups`, `rows` of the output, `taps`.
            dtype: element type that it computes in.
            peak: FLOP/s of all multiprocessors in that type.
        """
        if not set(_SIZES) <= set(sizes):
            return 0.0
        into, out, groups, rows, taps = (float(sizes[name]) for name in _SIZES)
        if kind.endswith(("weight", "wgrad")):
            shape = out, into * taps, rows
        elif kind.endswith(("input", "dgrad")):
            # A step between pixels makes more of them, and fewer taps that reach each.
            stride = float(sizes.get("stride", 1))
            shape = rows * stride, into, max(1.0, out * taps / stride)
        else:
            shape = rows, out, into * taps
        return self.product_s(*shape, groups, dtype, peak)
