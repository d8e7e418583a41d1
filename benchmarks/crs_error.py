"""The error of sampled matrix products: Adelman, Silberstein 2018, figures 1a and 1b.

    python -m benchmarks.crs_error

Left and right factor are 100x100, entries normal with variance 1 and mean 0 (figure 1b; the mean of
figure 1a is not named, so 1 is taken beside it). The error of an estimate is its distance from the
product, Frobenius norm, divided by the norms of both factors: the mean over runs, by the share of
terms that is taken. The bound is that of Drineas, Kannan, Mahoney 2006, theorem 1, for sampling by
norm with replacement: 1 / sqrt(terms taken).
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import line_plot
from benchmarks.timing import RESULTS, write_results
from graphpass.column_row import choose, taken
from graphpass.method import get_method

SHARES = tuple(share / 10 for share in range(1, 11))
TOP, BOUND = "top, unscaled", "bound"


def variants() -> dict[str, Any]:
    """Return the parameters of every variant, by the name of its line."""
    crs, unscaled = get_method("crs").params, get_method("crs_unscaled").params
    found = {}
    for sampling in ("norm", "uniform"):
        for replacement in (True, False):
            for params, scaled in ((crs, "scaled"), (unscaled, "unscaled")):
                name = f"{sampling}, {'with' if replacement else 'without'} replacement, {scaled}"
                found[name] = params(sampling=sampling, replacement=replacement, least=1)
    return {**found, TOP: unscaled(least=1)}


def errors(left: Tensor, right: Tensor, share: float) -> dict[str, float]:
    """Return the mean error of every variant on [runs, M, K] @ [runs, K, N].

    Args:
        left: one factor of each run.
        right: the other.
        share: of the terms that is taken, in (0, 1].
    """
    masses = left.norm(dim=1) * right.norm(dim=2)
    runs, terms = masses.shape
    exact, size = left @ right, left.norm(dim=(1, 2)) * right.norm(dim=(1, 2))

    def error(index: Tensor, weight: Tensor | None) -> float:
        columns = torch.take_along_dim(left, index[:, None, :], 2)
        if weight is not None:
            columns = columns * weight[:, None, :]
        estimate = columns @ torch.take_along_dim(right, index[:, :, None], 1)
        return float(((estimate - exact).norm(dim=(1, 2)) / size).mean())

    result = {}
    for name, params in variants().items():
        count = taken(terms, type(params)(keep=share, least=1))
        width = count if params.replacement else terms
        draws = None if params.sampling == "top" else torch.rand(runs, width).clamp_min(1e-7)
        result[name] = error(*choose(params, masses, draws, count))
    count = round(share * terms)
    # The paper's: terms drawn one after the other in proportion to p, weights as if replaced.
    index = (masses / -torch.rand(runs, terms).clamp_min(1e-7).log()).topk(count, dim=1).indices
    weight = masses.sum(1, keepdim=True) / (count * masses.gather(1, index))
    result["norm, without replacement, scaled by 1 / kp"] = error(index, weight)
    result[BOUND] = count**-0.5
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write the results and two plots."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crs_error", description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--size", type=int, default=100, help="rows and columns")
    parser.add_argument("--output", default="crs_error", help="name of the results file")
    given = parser.parse_args(argv)
    record: dict[str, Any] = {}
    for mean in (0, 1):
        torch.manual_seed(mean)
        shape = (given.runs, given.size, given.size)
        left, right = (torch.randn(shape) + mean for _ in range(2))
        rows = [errors(left, right, share) for share in SHARES]
        lines = {name: [row[name] for row in rows] for name in rows[0]}
        record[f"mean {mean}"] = lines
        Console().print(_table(f"entries of mean {mean}", lines))
        title = f"Error of sampled products, {given.size}x{given.size}, entries of mean {mean}"
        path = RESULTS / f"{given.output}-mean{mean}.svg"
        labels = ("share of terms taken", "|AB - estimate| / (|A| |B|)")
        drawn = {name: line_plot.Line(SHARES, values) for name, values in lines.items()}
        line_plot.write(path, title, labels, SHARES, drawn)
    settings = {"runs": given.runs, "size": given.size, "shares": SHARES}
    Console().print(f"written to {write_results(given.output, {**settings, 'errors': record})}")


def _table(title: str, lines: dict[str, list[float]]) -> Table:
    table = Table(title=title)
    table.add_column("variant")
    for share in SHARES:
        table.add_column(f"{share:.0%}")
    for name, values in lines.items():
        table.add_row(name, *(f"{value:.4f}" for value in values))
    return table


if __name__ == "__main__":
    main()
