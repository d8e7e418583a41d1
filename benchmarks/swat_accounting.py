"""What sparse training saves, counted, beside what Raihan, Aamodt 2020 (SWAT) report.

    python -m benchmarks.swat_accounting

FLOPs, weights and activations of the networks and settings of the paper's tables 2 and 4, and the
cycles of a machine that skips zeros (table 6). Nothing is trained and nothing is timed: these are
formulas over the shapes of the layers (`cost_model.sparsity`, `cost_model.accelerator`).
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from math import prod
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.timing import write_results
from cost_model.accelerator import SparseArray, SparseProduct, speedup
from cost_model.sparsity import Saved, SparseLayer, erk_densities, saved, uniform_densities
from examples.models import build


@dataclass(frozen=True, slots=True)
class Row:
    """A setting of the paper, and its figures in percent; None where the paper has none.

    Attributes:
        table: number of the table in the paper.
        network: name of the model.
        distribution: of zeros over the layers, "U", "ERK" or "M".
        sparsity: of the weights.
        act: of the layers' inputs.
        training: FLOPs of a training step saved.
        memory: activations saved.
        inference: FLOPs of inference saved.
    """

    table: int
    network: str
    distribution: str
    sparsity: float
    act: float
    training: float
    memory: float
    inference: float


# Raihan, Aamodt 2020 (arXiv:2001.01969), tables 2 (unstructured) and 4 (structured), CIFAR-10.
PAPER = (
    Row(2, "vgg16", "U", 90, 90, 89.7, 36.2, 89.5),
    Row(2, "vgg16", "ERK", 95, 82, 89.5, 33.0, 89.5),
    Row(2, "vgg16", "M", 95, 65, 64.0, 25.0, 58.4),
    Row(2, "wrn-16-8", "U", 90, 90, 90.0, 49.0, 90.0),
    Row(2, "wrn-16-8", "ERK", 95, 84, 91.4, 45.8, 91.7),
    Row(2, "wrn-16-8", "M", 95, 78, 86.3, 42.5, 85.9),
    Row(2, "densenet121", "U", 90, 90, 89.8, 44.0, 89.8),
    Row(2, "densenet121", "ERK", 90, 88, 89.7, 43.0, 89.6),
    Row(2, "densenet121", "M", 90, 86, 84.2, 42.0, 83.6),
    *(
        Row(4, network, "U", share, share, share - flops, round(share * memory, 1), share - flops)
        for network, flops, memory in (("resnet18", 0.2, 0.52), ("densenet121", 0.1, 0.5))
        for share in (50.0, 60.0, 70.0)
    ),
)
_RELU_DENSITY = 0.5

# Table 6: ResNet-50 on ImageNet, speed-up of forward and backward pass by sparsity.
PAPER_CYCLES = {0.8: (3.3, 3.4), 0.9: (5.6, 6.3)}


def layers_of(model: nn.Module, image_size: int) -> tuple[list[SparseLayer], int]:
    """Return the layers with weights, for one image, and how many values BatchNorms read."""
    layers: list[SparseLayer] = []
    normalised = 0

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal normalised
            if isinstance(module, nn.BatchNorm2d):
                normalised += inputs[0].numel()
                return
            assert isinstance(module.weight, Tensor)
            positions = prod(output.shape[2:])
            shape = tuple(module.weight.shape)
            layers.append(SparseLayer(name, shape, positions, inputs[0].numel()))

        return hook

    model = model.to("meta").eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.register_forward_hook(look(name))
    model(torch.empty(1, 3, image_size, image_size, device="meta"))
    return layers, normalised


def account(row: Row) -> Saved:
    """Return what the setting of a row saves; of ERK, with the densities that its formula gives.

    What a layer keeps of its input is zero in part where a ReLU made it: behind a normalisation
    half of the values are. That is less than the density by ERK of a few layers, most of all of
    1x1 shortcuts, and the paper's share of zeros can only be had by counting it.
    """
    layers, normalised = layers_of(_network(row.network), 32)
    density = 1 - row.sparsity / 100
    if row.distribution == "U":
        densities = uniform_densities(layers, density)
    else:
        densities = erk_densities([layer.weight for layer in layers], density)
    inputs = (densities[0], *(min(density, _RELU_DENSITY) for density in densities[1:]))
    return saved(layers, densities, normalised, inputs)


def _network(name: str) -> nn.Module:
    """Return a network as the paper's code has it: VGG-16 with all three of its linear layers."""
    model = build(name)
    if name == "vgg16":
        sizes = (512, 4096, 4096, 10)
        model.fc = nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(sizes)))
    return model


def resnet50() -> list[SparseLayer]:
    """Return the layers of ResNet-50 for ImageNet: 224 pixels, a 7x7 stem and a pooling."""
    layers, _ = layers_of(build("resnet50", image_size=56, num_classes=1000), 56)
    # Behind the stem and the pooling, maps are 56x56 as in the network for small images.
    layers[0] = replace(layers[0], weight=(64, 3, 7, 7), positions=112**2, inputs=3 * 224**2)
    return layers


def passes(sparsity: float) -> tuple[list[SparseProduct], list[SparseProduct]]:
    """Return the products of a forward and of a backward pass of ResNet-50 under SWAT-U."""
    forward, backward = [], []
    for number, layer in enumerate(resnet50()):
        density = 1.0 if number == 0 else 1 - sparsity
        out, inner = layer.weight[0], prod(layer.weight[1:])
        channels, taps = layer.weight[1], prod(layer.weight[2:])
        forward.append(SparseProduct(out, inner, layer.positions, density))
        if number:
            # dx: the filters turned round, one for each input channel; as many FLOPs as forward.
            backward.append(SparseProduct(channels, out * taps, layer.positions, density))
        # dw: the activations are sparse; for each tap and channel, a vector over the positions.
        backward.append(SparseProduct(inner, layer.positions, out, density))
    return forward, backward


def main(argv: Sequence[str] | None = None) -> None:
    """Count, print two tables, write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.swat_accounting", description=__doc__
    )
    parser.add_argument("--output", default="swat_accounting", help="name of the results file")
    given = parser.parse_args(argv)
    rows = [(row, account(row) if row.distribution != "M" else None) for row in PAPER]
    Console().print(_table(rows))
    cycles = {
        str(sparsity): {
            "paper": {"forward": paper[0], "backward": paper[1]},
            **{
                "balanced lanes" if balanced else "separate lanes": {
                    name: speedup(products, SparseArray(balanced=balanced))
                    for name, products in zip(
                        ("forward", "backward"), passes(sparsity), strict=True
                    )
                }
                for balanced in (True, False)
            },
        }
        for sparsity, paper in PAPER_CYCLES.items()
    }
    Console().print(_cycle_table(cycles))
    record = [
        {"paper": asdict(row), "counted": counted and asdict(counted)} for row, counted in rows
    ]
    written = write_results(given.output, {"rows": record, "cycles": cycles})
    Console().print(f"written to {written}")


def _table(rows: Sequence[tuple[Row, Saved | None]]) -> Table:
    table = Table(title="Saved, in %: counted (paper)")
    columns = "table", "network", "zeros", "weights", "layer inputs", "training", "memory"
    for column in (*columns, "inference"):
        table.add_column(column)
    for row, counted in rows:
        figures = (row.sparsity, row.act, row.training, row.memory, row.inference)
        mine: Sequence[float | None] = [None] * len(figures)
        if counted is not None:
            shares = (counted.weights, counted.layer_inputs, counted.training_flops,
                      counted.activations, counted.inference_flops)  # fmt: skip
            mine = [100 * share for share in shares]
        cells = (
            f"{'-' if value is None else f'{value:.1f}'} ({paper:.1f})"
            for value, paper in zip(mine, figures, strict=True)
        )
        table.add_row(str(row.table), row.network, row.distribution, *cells)
    return table


def _cycle_table(cycles: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="ResNet-50, times fewer cycles where zeros are skipped")
    for column in ("sparsity", "lanes", "forward", "backward"):
        table.add_column(column)
    for sparsity, machines in cycles.items():
        for name, speedups in machines.items():
            table.add_row(sparsity, name, *(f"{speedups[k]:.2f}" for k in ("forward", "backward")))
    return table


if __name__ == "__main__":
    main()
