"""Weight gradients of GA's eight convolutions: top-k as it is compiled here, against the vendor.

    python -m benchmarks.layers                 # writes results/layers.json

The shapes are those of Table 1 of Wang, Nelaturu and Amarasinghe 2019: batch 128, 3x3, stride 1.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import graphpass
from benchmarks.timing import interleave, ratio, write_results
from graphpass.methods.topk import Params
from graphpass.site import ConvGeometry, Gradient, Site

BATCH = 128
# Input channels, output channels, height and width.
SHAPES = (
    (256, 256, 8), (128, 128, 16), (512, 512, 4), (512, 512, 2),
    (64, 64, 32), (16, 16, 32), (32, 32, 16), (64, 64, 8),
)  # fmt: skip
GEOMETRY = ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every shape, print a table, write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for memory_format in (torch.channels_last, torch.contiguous_format):
            rows += [measure(shape, dtype, memory_format, given.rounds) for shape in SHAPES]
    Console().print(_table(rows))
    Console().print(f"written to {write_results('layers', {'batch': BATCH, 'rows': rows})}")


def measure(
    shape: tuple[int, int, int], dtype: torch.dtype, memory_format: torch.memory_format, rounds: int
) -> dict[str, Any]:
    """Return seconds of the exact and the top-1 weight gradient of one convolution."""
    channels, filters, size = shape
    x = torch.randn(BATCH, channels, size, size).to(dtype, memory_format=memory_format)
    grad = torch.randn(BATCH, filters, size, size).to(dtype, memory_format=memory_format)
    weight = torch.randn(filters, channels, 3, 3).to(dtype, memory_format=memory_format)
    runs = {"exact": _exact(grad, x, weight), "topk": _topk(grad, x, weight)}
    for run in runs.values():
        run()
    seconds = interleave(runs, rounds, repeat=2)
    medians = {name: statistics.median(series) for name, series in seconds.items()}
    return {
        "input_channels": channels,
        "output_channels": filters,
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "channels_last": memory_format == torch.channels_last,
        "exact_s": medians["exact"],
        "topk_s": medians["topk"],
        "exact_over_topk": ratio(seconds["exact"], seconds["topk"]),
    }


def _exact(grad: Tensor, x: Tensor, weight: Tensor) -> Callable[[], object]:
    return lambda: torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
    )


def _topk(grad: Tensor, x: Tensor, weight: Tensor) -> Callable[[], object]:
    method, params = graphpass.methods()["topk"], Params(min_positions=1)
    shapes = (tuple(x.shape), tuple(weight.shape), tuple(grad.shape))
    site = Site(
        "conv", "conv", Gradient.WEIGHT, "convolution", "node", 1, 1, shapes, shapes[1],
        str(grad.dtype), grad.dtype.itemsize, GEOMETRY,
    )  # fmt: skip
    seed = torch.zeros((), dtype=torch.int64)

    def lowered(grad: Tensor, x: Tensor) -> Tensor:
        result: Tensor = method.lower(site, params, weight, seed, 0, grad, x)
        return result

    # Every shape compiles the same function: Dynamo would give up after a few of them.
    torch._dynamo.reset()
    compiled = torch.compile(lowered, dynamic=False)
    return lambda: compiled(grad, x)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(
        title=f"weight gradient, batch {BATCH}, 3x3: vendor's exact product against top-1"
    )
    for column in ("Ci", "Co", "H=W", "dtype", "layout", "exact ms", "top-1 ms", "times faster"):
        table.add_column(column, justify="right")
    for row in rows:
        faster = row["exact_over_topk"]
        table.add_row(
            str(row["input_channels"]),
            str(row["output_channels"]),
            str(row["size"]),
            row["dtype"],
            "channels_last" if row["channels_last"] else "NCHW",
            f"{1e3 * row['exact_s']:.2f}",
            f"{1e3 * row['topk_s']:.2f}",
            "{median:.1f} ({low_quartile:.1f} to {high_quartile:.1f})".format(**faster),
        )
    return table


if __name__ == "__main__":
    main()
