"""Gradients of GA's eight convolutions: every method as it is compiled here, against the vendor.

    python -m benchmarks.layers
    python -m benchmarks.layers --methods int8 topk --dtypes fp32 --threads 1

The shapes are those of Table 1 of Wang, Nelaturu and Amarasinghe 2019: batch 128, 3x3, stride 1.
Both sides get the memory format in which the vendor's product is fastest, channels_last here. A
method's time is everything it adds to a step: selecting, quantising, pruning, and the product; the
seconds of reading its operands once and doing its FLOPs at the machine's peak stand beside it. In a
step both gradients of a layer share what is done to the output gradient, so methods that have both
are measured on both at once too. Two products alone stand beside them: "sampled" of rows that are
given, and "int8 product" of bytes that are given. "int8 quarter" is `int8` of a quarter of the
samples: as many products as `pixels_int8` has, which chooses and gathers pixels besides.
"""

import argparse
import statistics
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx

import graphpass
from benchmarks import layer
from benchmarks.layer import BATCH, DTYPES, GA, Run, Shape
from benchmarks.timing import interleave, ratio, write_results
from codegen.kernel import kernels, unavailable
from cost_model import counted_once, element_count, total
from graphpass.method import Method
from graphpass.site import Gradient, Site

# Methods whose products are of another type than their operands.
_COMPUTES_IN = {
    "int8": torch.int8,
    "bf16": torch.bfloat16,
    "pixels": torch.bfloat16,
    "pixels_int8": torch.int8,
    "sampled": torch.bfloat16,
}
PRODUCTS = ((Gradient.WEIGHT,), (Gradient.INPUT,), (Gradient.WEIGHT, Gradient.INPUT))
# Shares of the output pixels that the sampled product alone is measured at.
KEPT = (0.25, 1.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every shape, print a table, write the results."""
    given = _parse(argv)
    torch.set_num_threads(given.threads)
    console, rows = Console(width=120), []
    for name in given.dtypes:
        for gradients in PRODUCTS:
            for shape in GA:
                rows += measure(shape, DTYPES[name], gradients, given.methods, given.rounds)
    console.print(_table(rows))
    peaks = {name: peak_flops_per_s(DTYPES[name]) for name in given.dtypes}
    record = {
        "batch": BATCH, "peak_flops_per_s": peaks, "bandwidth_bytes_per_s": bandwidth_bytes_per_s(),
        "rows": rows,
    }  # fmt: skip
    console.print(f"written to {write_results(given.output, record)}")


def measure(
    shape: Shape,
    dtype: torch.dtype,
    gradients: tuple[Gradient, ...],
    names: Sequence[str],
    rounds: int,
) -> list[dict[str, Any]]:
    """Return the seconds of exact products and of every method that has a form for all of them."""
    operands = layer.operands(shape, BATCH, dtype, "cpu")
    sites = [layer.site(shape, operands, gradient) for gradient in gradients]
    runs = {"exact": layer.exact(shape, operands, gradients)}
    work = {}
    for name in names:
        method = graphpass.methods()[name]
        params = layer.parameters(method)
        # A method that finds itself slower than the vendor is measured all the same.
        if all(layer.has_form(method, site, params) for site in sites):
            runs[name] = _lowered(method, params, sites, operands)
            kernels_of = [kernel for site in sites for kernel in method.cost(site, params)]
            work[name] = total(counted_once(kernels_of)).evaluate()
    if gradients == (Gradient.WEIGHT,):
        for keep in KEPT:
            name = f"sampled {keep:.0%}"
            runs[name], work[name] = _sampled(operands, keep), _sampled_work(sites[0], keep)
        if "int8" in work:
            runs["int8 quarter"], work["int8 quarter"] = _int8_of_some(shape, dtype)
    if "int8" in work and len(sites) == 1:
        runs["int8 product"], work["int8 product"] = _of_bytes(sites[0], operands)
    for run in runs.values():
        run()
    seconds = interleave(runs, rounds, repeat=2)
    rows = []
    for name, (flops, *moved) in work.items():
        peak = peak_flops_per_s(_COMPUTES_IN.get(name.split()[0], dtype))
        roofline = max(flops / peak, sum(moved) / bandwidth_bytes_per_s())
        rows.append(
            {
                "input_channels": shape[0], "output_channels": shape[1], "size": shape[2],
                "dtype": str(dtype).removeprefix("torch."), "gradient": " and ".join(gradients),
                "method": name,
                "exact_s": statistics.median(seconds["exact"]),
                "method_s": statistics.median(seconds[name]),
                "roofline_s": roofline,
                "exact_over_method": ratio(seconds["exact"], seconds[name]),
            }
        )  # fmt: skip
    return rows


@cache
def peak_flops_per_s(dtype: torch.dtype) -> float:
    """Return what the vendor reaches: the best of several products, 1024 cubed or a convolution."""
    left, right = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
    product = torch._int_mm if dtype is torch.int8 else torch.mm
    best = 2 * 1024**3 / min(interleave({"mm": lambda: product(left, right)}, 20, 1)["mm"])
    if dtype is torch.int8:
        return best
    # Matrix products in float32 go to another library, which is slower on some processors.
    x = torch.randn(BATCH, 128, 16, 16).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(128, 128, 3, 3).to(dtype, memory_format=torch.channels_last)
    run = {"conv": lambda: torch.conv2d(x, weight, padding=1)}
    return max(best, 2 * 9 * 128 * x.numel() / min(interleave(run, 20, 1)["conv"]))


@cache
def bandwidth_bytes_per_s() -> float:
    """Return what a copy of 64 MiB reaches, bytes read and written counted."""
    source = torch.ones(2**24)
    target = torch.empty_like(source)
    seconds = min(interleave({"copy": lambda: target.copy_(source)}, 20, 1)["copy"])
    return 2 * source.numel() * source.itemsize / seconds


def _lowered(
    method: Method, params: Any, sites: Sequence[Site], operands: dict[str, Tensor]
) -> Run:
    seed = torch.zeros((), dtype=torch.int64)
    values = operands.values()

    def lowered(seed: Tensor, *values: Tensor) -> list[Tensor]:
        named = dict(zip(operands, values, strict=True))
        return [layer.lower(method, params, site, named, seed) for site in sites]

    # As in a training step: traced, or Dynamo would break it into many small graphs; and called
    # without Dynamo's guards, which a step passes once and not for every layer.
    compiled = torch._inductor.compile(make_fx(lowered)(seed, *values), [seed, *values])
    return lambda: compiled(seed, *values)


def _sampled(operands: dict[str, Tensor], keep: float) -> Run:
    """Return the sampled product of evenly spread pixels, with weights, centred."""
    grad, x = operands["grad"], operands["input"]
    count = grad.numel() // grad.shape[1]
    index = torch.arange(0, count, round(1 / keep))
    weight = torch.full((len(index),), 1 / keep)
    center, sums = torch.rand(x.shape[1]), torch.rand(grad.shape[1], 3, 3)
    window = [3, 3], [1, 1], [1, 1], [1, 1]
    kernel = kernels()["sampled_wgrad"]
    given = (grad, x, index, weight, center, sums, *window, 1, True)
    # As in a compiled step: what runs was decided as it was traced.
    assert unavailable(kernel, *given) is None
    return lambda: kernel.op(*given)


def _sampled_work(site: Site, keep: float) -> tuple[int, int, int]:
    x, _, grad = (int(element_count(shape)) * site.itemsize for shape in site.shapes)
    flops, _, written = site.cost.evaluate()
    return int(keep * flops), x + int(keep * grad), written


def _int8_of_some(shape: Shape, dtype: torch.dtype) -> tuple[Run, tuple[int, int, int]]:
    """Return int8's weight gradient, rounding included, of a quarter of the samples."""
    method = graphpass.methods()["int8"]
    operands = layer.operands(shape, BATCH // 4, dtype, "cpu")
    params = layer.parameters(method)
    site = layer.site(shape, operands, Gradient.WEIGHT)
    work = total(counted_once(method.cost(site, params))).evaluate()
    return _lowered(method, params, [site], operands), work


def _of_bytes(site: Site, operands: dict[str, Tensor]) -> tuple[Run, tuple[int, int, int]]:
    """Return int8's product of operands that are rounded already, and its work."""
    method = graphpass.methods()["int8"]
    params = layer.parameters(method)
    kernel = kernels()["int8_wgrad" if site.gradient is Gradient.WEIGHT else "int8_dgrad"]
    names = method.operands(site, params)

    def lowered(seed: Tensor, *given: Tensor) -> Tensor:
        return layer.lower(
            method, params, site, {**operands, **dict(zip(names, given, strict=True))}, seed
        )

    values = [torch.zeros((), dtype=torch.int64), *(operands[name] for name in names)]
    recorder = _Recorder(make_fx(lowered)(*values), kernel.op)
    recorder.run(*values)
    terms = [term for term in method.cost(site, params) if term.kind == kernel.name]
    return recorder.call, total(terms).evaluate()


class _Recorder(Interpreter):
    """Runs a graph and keeps the one call of an operator, to repeat it."""

    def __init__(self, graph: GraphModule, operator: Any) -> None:
        super().__init__(graph)
        self.operator = operator
        self.call: Run

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is self.operator:
            self.call = partial(target, *args, **kwargs)
        return super().call_function(target, args, kwargs)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"gradients of 3x3 convolutions, batch {BATCH}, channels_last")
    for column in (
        "Ci", "Co", "H=W", "dtype", "gradient", "method", "exact ms", "ms", "times faster",
        "quartiles", "roofline ms",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for row in rows:
        faster = row["exact_over_method"]
        table.add_row(
            *(str(row[key]) for key in ("input_channels", "output_channels", "size", "dtype")),
            row["gradient"],
            row["method"],
            f"{1e3 * row['exact_s']:.2f}",
            f"{1e3 * row['method_s']:.2f}",
            "{median:.1f}".format(**faster),
            "{low_quartile:.1f} to {high_quartile:.1f}".format(**faster),
            f"{1e3 * row['roofline_s']:.2f}",
        )
    return table


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    names = [name for name in graphpass.methods() if name not in {"zero", "random"}]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__)
    parser.add_argument("--methods", nargs="+", default=names, choices=names)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default="layers", help="name of the results file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
