"""Which tiles a product is cut into: a short list in the order of predicted time.

A multiprocessor works on one tile at a time, step by step along what is contracted; a step takes as
long as its multiplications, or as its operands need from the cache. All multiprocessors together
take as long as the one with most tiles. Few tiles with much to contract are shared out among
`splits` programs, whose sums are added up behind them.

Emission takes the first of the list, or one behind it inside `ranked`: what is launched is decided
by timing the first few (`codegen.gpu.choice`), and one without tiles, where there is one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from codegen.gpu.source import ceil_div, multiprocessors, power

# What a multiprocessor of an H200 does in a clock: products, by bytes of a value, and bytes from
# memory, its share, as its data sheet has them; bytes from the L2 cache, assumed.
# NOTE [Why codegen has figures of hardware]: those of `cost_model`, which codegen does not know,
# are rates of whole machines, for predictions that people read and plans are made of. These only
# put a list in order, whose first entries are timed. A test holds both to each other.
PRODUCTS = {1: 4096, 2: 2048, 4: 1024}
_CACHE_BYTES, MEMORY_BYTES = 32, 20
# Clocks that a step takes at least, and beginning and ending a program.
_STEP, _PROGRAM = 150, 1500
# What is worth timing: so many, and predicted to take no longer than so many times the first.
LONGEST, _CLOSE = 3, 1.25
# The rank at which weight gradients have their operands gathered, and multiplied by the vendor.
GATHERED = LONGEST


@dataclass(frozen=True, slots=True)
class Work:
    """A product that is cut into tiles.

    Attributes:
        rows: of the result of a group.
        columns: of the result of a group.
        steps: values that are contracted, in tiles of `deep`.
        deep: contracted values of a tile.
        groups: how many such products.
        itemsize: bytes of a value.
        least: rows and columns of the smallest tile that is considered.
        widest: columns of the largest.
        turned: whether operands are turned around on their way to the tensor cores, which then
            take bytes at half their rate.
        shared: whether several programs may share what is contracted for a tile.
    """

    rows: int
    columns: int
    steps: int
    deep: int
    groups: int
    itemsize: int
    least: int
    widest: int = 128
    turned: bool = False
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Tile:
    """One way to cut.

    Attributes:
        high: rows.
        wide: columns.
        splits: programs that share a tile.
    """

    high: int
    wide: int
    splits: int = 1


def best(work: Work) -> Tile:
    """Return the first tile of the short list, or that of the rank in force."""
    listed = short_list(work)
    return listed[min(_RANK.get(), len(listed) - 1)]


@contextmanager
def ranked(rank: int) -> Iterator[None]:
    """Let what is emitted take the entry of its short list with this number, or the last one."""
    before = _RANK.set(rank)
    try:
        yield
    finally:
        _RANK.reset(before)


_RANK: ContextVar[int] = ContextVar("rank", default=0)


def gathering() -> bool:
    """Return whether what is emitted may gather its operands for the vendor's library."""
    return _RANK.get() >= GATHERED


def short_list(work: Work) -> tuple[Tile, ...]:
    """Return the tiles worth timing, those with the least predicted clocks first."""
    heights, widths = (
        sorted({power(size, 16, most) for most in (32, 64, 128, 256) if work.least <= most <= top})
        for size, top in ((work.rows, 128), (work.columns, work.widest))
    )
    found = [
        (clocks(work, tile), -high, -wide, splits, tile)
        for high in heights
        for wide in widths
        for splits in _splits(work)
        for tile in (Tile(high, wide, splits),)
    ]
    # Of equals the larger, and the one with fewer sums.
    found.sort(key=lambda entry: entry[:4])
    limit = _CLOSE * found[0][0]
    # Beside a tile, the same with twice as many splits is rarely worth a try: one of each.
    kept: dict[tuple[int, int], Tile] = {}
    for time, *_, tile in found:
        if time <= limit:
            kept.setdefault((tile.high, tile.wide), tile)
    return tuple(kept.values())[:LONGEST]


def clocks(work: Work, tile: Tile) -> float:
    """Return the predicted clocks of a product that is cut in this way."""
    tiles = ceil_div(work.rows, tile.high) * ceil_div(work.columns, tile.wide) * work.groups
    rate = PRODUCTS[work.itemsize] / (2 if work.turned and work.itemsize == 1 else 1)
    multiplied = tile.high * tile.wide * work.deep / rate
    loaded = (tile.high + tile.wide) * work.deep * work.itemsize / _CACHE_BYTES
    waves = ceil_div(tiles * tile.splits, multiprocessors())
    step = max(multiplied, loaded, _STEP)
    spent = waves * (ceil_div(work.steps, tile.splits) * step + _PROGRAM)
    if work.shared:
        # Sums are written and read.
        sums = 8 * tile.splits * work.rows * work.groups * work.columns
        spent += sums / (MEMORY_BYTES * multiprocessors())
    return spent


def _splits(work: Work) -> Iterator[int]:
    yield 1
    splits = 2
    while work.shared and splits <= min(work.steps // 2, 256):
        yield splits
        splits *= 2
