"""Back-propagation through the convolutions of two networks, pruned at p = 0.99 against exact.

    python -m benchmarks.pruning
    python -m benchmarks.pruning --threads 1 --rounds 9 --p 0.9

Ye et al. 2020 report 1.71 (ResNet-18) to 3.99 (AlexNet) on CIFAR-10, against their own dense code.
Here the other side is the vendor's dense product. The time of pruning holds everything it adds: the
threshold, as the compiler fuses it, and both products; a network's first convolution is exact on
both sides, and not counted. Gradients are drawn: normal values; samples, pixels and channels differ
in scale so much that a density results as ResNet-20 shows in training, 0.22. Of AlexNet, whose
convolutions stand before ReLU and pooling, all but 9 % are zero, as the paper's Table 1 says.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.timing import gate, interleave, write_results
from codegen.kernel import kernels
from graphpass.methods.prune import Params, density, threshold

BATCH = 128
aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution that occurs `times` times in a network; all its figures are square."""

    channels: int
    filters: int
    size: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    times: int = 1


# Layers, and the share of an output gradient that no mask has set to zero. The first layer needs no
# input gradient, and is left out.
NETWORKS: dict[str, tuple[float, tuple[Layer, ...]]] = {
    "ResNet-18": (
        1.0,
        (
            Layer(64, 64, 32, times=4),
            Layer(64, 128, 32, stride=2),
            Layer(64, 128, 32, 1, 2, 0),
            Layer(128, 128, 16, times=3),
            Layer(128, 256, 16, stride=2),
            Layer(128, 256, 16, 1, 2, 0),
            Layer(256, 256, 8, times=3),
            Layer(256, 512, 8, stride=2),
            Layer(256, 512, 8, 1, 2, 0),
            Layer(512, 512, 4, times=3),
        ),
    ),
    "AlexNet": (
        0.09,
        (
            Layer(64, 192, 16, padding=2),
            Layer(192, 384, 8),
            Layer(384, 256, 8),
            Layer(256, 256, 8),
        ),
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both networks with each number of threads, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--p", type=float, default=0.99)
    parser.add_argument("--block", type=int, default=1)
    parser.add_argument("--no-gate", action="store_true", help="do not run the contract tests")
    parser.add_argument("--output", default="pruning", help="name of the results")
    given = parser.parse_args(argv)
    if not given.no_gate:
        gate()
    params, console = Params(p=given.p, block=given.block), Console(width=110)
    rows = []
    for threads in given.threads:
        torch.set_num_threads(threads)
        for network, (share, layers) in NETWORKS.items():
            for layer in layers:
                row = _measure(layer, share, params, given.rounds)
                rows.append({"network": network, "threads": threads, **row})
    networks = [_total(rows, network, n) for n in given.threads for network in NETWORKS]
    console.print(_table(rows, networks))
    record = {"batch": BATCH, "p": given.p, "block": given.block}
    path = write_results(given.output, {**record, "networks": networks, "layers": rows})
    console.print(f"written to {path}")


def _measure(layer: Layer, share: float, params: Params, rounds: int) -> dict[str, Any]:
    """Return the median seconds of both gradients of a layer, exact and pruned."""
    grad, x, weight = _operands(layer, share)
    axes = [[layer.stride] * 2, [layer.padding] * 2, [1, 1]]
    seed = torch.tensor(1)
    # Traced as it is in a training step, where it is fused with what computes the gradient.
    compiled = torch.compile(make_fx(lambda grad: threshold(grad, params))(grad), dynamic=False)
    dgrad, wgrad = kernels()["pruned_dgrad"].op, kernels()["pruned_wgrad"].op

    def exact() -> None:
        for mask in ([True, False, False], [False, True, False]):
            aten.convolution_backward(grad, x, weight, None, *axes, False, [0, 0], 1, mask)

    def pruned() -> None:
        tau = compiled(grad)
        dgrad(grad, weight, tau, seed, list(x.shape), *axes, 1, 0, params.block)
        wgrad(grad, x, tau, seed, list(weight.shape[2:]), *axes, 1, 0, params.block)

    runs: dict[str, Callable[[], object]] = {"exact": exact, "pruned": pruned}
    for run in runs.values():
        run()
    seconds = interleave(runs, rounds, repeat=2)
    return {
        "layer": f"{layer.channels}x{layer.filters}x{layer.size} {layer.kernel}x{layer.kernel}"
        + f"/{layer.stride}",
        "times": layer.times,
        "density": float(density(grad, params)),
        "exact_s": statistics.median(seconds["exact"]),
        "pruned_s": statistics.median(seconds["pruned"]),
        "exact_over_pruned": statistics.median(
            mine / other for mine, other in zip(seconds["exact"], seconds["pruned"], strict=True)
        ),
    }


def _operands(layer: Layer, share: float) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    out = (layer.size + 2 * layer.padding - layer.kernel) // layer.stride + 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    grad = normal(BATCH, layer.filters, out, out)
    scales = normal(BATCH, 1, 1, 1) + normal(BATCH, 1, out, out) + normal(1, layer.filters, 1, 1)
    grad *= torch.exp(0.75 * scales)
    grad *= torch.rand(grad.shape, generator=random) < share
    x = normal(BATCH, layer.channels, layer.size, layer.size).relu()
    weight = normal(layer.filters, layer.channels, layer.kernel, layer.kernel)
    last = torch.channels_last
    return grad.to(memory_format=last), x.to(memory_format=last), weight.to(memory_format=last)


def _total(rows: Sequence[dict[str, Any]], network: str, threads: int) -> dict[str, Any]:
    mine = [row for row in rows if (row["network"], row["threads"]) == (network, threads)]
    exact, pruned = (
        sum(row[key] * row["times"] for row in mine) for key in ("exact_s", "pruned_s")
    )
    return {
        "network": network, "threads": threads, "exact_s": exact, "pruned_s": pruned,
        "exact_over_pruned": exact / pruned,
    }  # fmt: skip


def _table(rows: Sequence[dict[str, Any]], networks: Sequence[dict[str, Any]]) -> Table:
    table = Table(
        "network", "threads", "layer", "times", "density", "exact ms", "pruned ms", "ratio"
    )
    for row in (*rows, *networks):
        table.add_row(
            row["network"], str(row["threads"]), row.get("layer", "all"), str(row.get("times", "")),
            f"{row['density']:.3f}" if "density" in row else "",
            f"{row['exact_s'] * 1e3:.1f}", f"{row['pruned_s'] * 1e3:.1f}",
            f"{row['exact_over_pruned']:.2f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
