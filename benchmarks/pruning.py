"""Back-propagation through the convolutions of whole networks, pruned at p = 0.99 against exact.

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
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.timing import gate, interleave, write_results
from codegen.kernel import kernels
from examples.models import build
from graphpass.methods.prune import Params, density, threshold

BATCH = 128
aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution; all its figures are square."""

    channels: int
    filters: int
    size: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1


# A network's layers with how often each occurs, and the share of an output gradient that no mask
# has set to zero.
Network = tuple[float, Mapping[Layer, int]]


def networks() -> dict[str, Network]:
    """Return the networks of the paper's table, by name."""
    found: dict[str, Network] = {
        f"ResNet-{depth}": (1.0, convolutions(build(f"resnet{depth}")))
        for depth in (18, 50, 101, 152)
    }
    alexnet = (
        Layer(64, 192, 16, padding=2),
        Layer(192, 384, 8),
        Layer(384, 256, 8),
        Layer(256, 256, 8),
    )
    return {**found, "AlexNet": (0.09, Counter(alexnet))}


def convolutions(model: nn.Module) -> Counter[Layer]:
    """Return the convolutions of a network but the first, which needs no input gradient."""
    layers: list[Layer] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        del output
        assert isinstance(module, nn.Conv2d)
        _, channels, size, _ = inputs[0].shape
        window = module.kernel_size[0], module.stride[0], int(module.padding[0])
        layers.append(Layer(channels, module.out_channels, size, *window))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    # Only shapes are wanted: nothing is computed on this device.
    model.to("meta")(torch.empty(1, 3, 32, 32, device="meta"))
    return Counter(layers[1:])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the networks with each number of threads, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--networks", nargs="+", default=list(networks()))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--p", type=float, default=0.99)
    parser.add_argument("--block", type=int, default=1)
    parser.add_argument("--no-gate", action="store_true", help="do not run the contract tests")
    parser.add_argument("--output", default="pruning", help="name of the results")
    given = parser.parse_args(argv)
    if not given.no_gate:
        gate()
    params, console = Params(p=given.p, block=given.block), Console(width=110)
    layers: list[dict[str, Any]] = []
    totals: list[dict[str, Any]] = []
    chosen = {name: network for name, network in networks().items() if name in given.networks}
    for threads in given.threads:
        torch.set_num_threads(threads)
        # The networks share most of their layers.
        measured: dict[tuple[Layer, float], dict[str, Any]] = {}
        for name, (share, counts) in chosen.items():
            for layer in counts:
                if (layer, share) not in measured:
                    row = _measure(layer, share, params, given.rounds)
                    measured[layer, share] = {"threads": threads, **row}
            rows = {layer: measured[layer, share] for layer in counts}
            totals.append({"network": name, "threads": threads, **_total(rows, counts)})
        layers += measured.values()
    console.print(_table(layers, totals))
    record = {"batch": BATCH, "p": given.p, "block": given.block}
    path = write_results(given.output, {**record, "networks": totals, "layers": layers})
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


def _total(rows: Mapping[Layer, dict[str, Any]], counts: Mapping[Layer, int]) -> dict[str, float]:
    exact, pruned = (
        sum(rows[layer][key] * times for layer, times in counts.items())
        for key in ("exact_s", "pruned_s")
    )
    return {"exact_s": exact, "pruned_s": pruned, "exact_over_pruned": exact / pruned}


def _table(layers: Sequence[dict[str, Any]], totals: Sequence[dict[str, Any]]) -> Table:
    table = Table("threads", "network or layer", "density", "exact ms", "pruned ms", "ratio")
    for row in (*layers, *totals):
        table.add_row(
            str(row["threads"]), row.get("network") or row["layer"],
            f"{row['density']:.3f}" if "density" in row else "",
            f"{row['exact_s'] * 1e3:.1f}", f"{row['pruned_s'] * 1e3:.1f}",
            f"{row['exact_over_pruned']:.2f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
