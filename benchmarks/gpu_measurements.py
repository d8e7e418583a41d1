"""What runs of `benchmarks.gpu` measured of single kernels, as the cost model has it.

    python -m benchmarks.gpu_measurements gpu_layers gpu_steps    # of results/

A run notes what every program took, by the name of its file, which is a hash of its text. Here the
text is emitted once more for every layer of the models and layers that were timed: the same text is
the same kernel, whose shapes are known here. So this has to be run with the code of the run. Of the
vendor's products it notes the seconds with their sizes. No GPU is needed.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import gpu_sections, gpu_steps, layer
from benchmarks.gpu_warm import ByOperators
from benchmarks.timing import RESULTS
from codegen.gpu import build
from codegen.kernel import kernels, triton_programs
from cost_model import KernelCost
from examples.models import build as build_model
from graphpass import kernels_of, trial
from graphpass.calibration import Measurement
from graphpass.candidates import ladder
from graphpass.method import Method
from graphpass.site import Gradient, Site

Record = dict[str, Any]
# Batch, shape, and the layer's name, on which the draws in a text depend.
Layer = tuple[int, layer.Shape, str]


def main(argv: Sequence[str] | None = None) -> None:
    """Write the measurements."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_measurements",
                                     description=__doc__)  # fmt: skip
    parser.add_argument("runs", nargs="+", help="names of results")
    default = Path(__file__).parent.parent / "graphpass" / "h200.json"
    parser.add_argument("--output", type=Path, default=default)
    given = parser.parse_args(argv)
    gpu_sections.allow_tf32()
    runs = [
        json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in given.runs
    ]
    found: dict[tuple[object, ...], Measurement] = {}
    for one in (*vendor(runs), *ours(runs)):
        known = found.get(one.identity)
        if known is None or one.seconds < known.seconds:
            found[one.identity] = one
    machine = {k: v for part in runs[-1]["sections"]["machine"] for k, v in part.items()}
    source = f"measured on {machine['gpu']}, torch {machine['torch']}, Triton {machine['triton']}"
    # A line each, to be read by people as well.
    lines = ",\n".join(json.dumps(asdict(one)) for one in found.values())
    text = f'{{"source": {json.dumps(source)}, "measurements": [\n{lines}\n]}}\n'
    given.output.write_text(text, encoding="utf-8")
    kinds = sorted({(one.kind, one.dtype) for one in found.values()})
    for kind in kinds:
        print(*kind, sum((one.kind, one.dtype) == kind for one in found.values()))


def vendor(runs: Sequence[Record]) -> Iterator[Measurement]:
    """Yield the exact products that were timed for plans, and those of layers."""
    for run in runs:
        for timed in run["sections"].get("timings", ()):
            for key, seconds in timed["seconds"].items():
                op, gradient, dtype, sizes, _, way = json.loads(key)
                if op == "convolution" and way == "exact":
                    x, weight, y = (tuple(sizes[at : at + 4]) for at in (0, 4, 8))
                    site = _site(x, weight, y, Gradient(gradient), getattr(torch, dtype))
                    yield _measured(kernels_of.exact(site)[0], seconds)
        for row in run["sections"].get("layers", ()):
            if "exact_s" in row:
                sizes = layer.sizes(tuple(row["shape"]), layer.BATCH)
                x, weight, y = (sizes[name] for name in ("input", "weight", "grad"))
                gradient, dtype = Gradient(row["gradient"]), layer.DTYPES[row["dtype"]]
                site = _site(x, weight, y, gradient, dtype)
                yield _measured(kernels_of.exact(site)[0], row["exact_s"])


def ours(runs: Sequence[Record]) -> Iterator[Measurement]:
    """Yield the kernels of methods whose programs a run has timed."""
    seconds: dict[str, float] = {}
    for run in runs:
        for entry in run["sections"].get("choices", ()):
            if "fastest" in entry:
                seconds[entry["predicted"]] = min(entry["seconds"].values())
    for batch, shape, name in _layers(runs):
        for dtype in layer.DTYPES.values():
            with FakeTensorMode(), ByOperators():
                given = {
                    operand: torch.empty(
                        size, dtype=dtype, device="cuda", memory_format=torch.channels_last
                    )
                    for operand, size in layer.sizes(shape, batch).items()
                }
                for gradient in layer.GRADIENTS:
                    site = replace(layer.site(shape, given, gradient), name=name, path=name)
                    for method, params in dict.fromkeys((*ladder(site), *_tabled(site))):
                        yield from _of_method(site, method, params, given, seconds)


def _of_method(
    site: Site, method: Method, params: Any, given: dict[str, torch.Tensor],
    seconds: dict[str, float],
) -> Iterator[Measurement]:  # fmt: skip
    if method.reject(site, params) is not None and not layer.has_form(method, site, params):
        return
    try:
        calls = trial.kernel_calls(site, method, params, given)
    except Exception as error:
        print(f"{method.name} of {site.shapes}: {error}")
        return
    for cost in method.cost(site, params):
        if calls.get(cost.kind):
            call: Any = calls[cost.kind].pop(0)
            programs = triton_programs(kernels()[cost.kind], *call.args)
            if not isinstance(programs, str):
                taken = seconds.get(build.path_of(cost.kind, programs[0]).name)
                if taken is not None:
                    yield _measured(cost, taken)


def _tabled(site: Site) -> Iterator[tuple[Method, Any]]:
    for name in layer.METHODS:
        method, params = layer.method_of(name)
        if site.gradient in method.gradients:
            yield method, params


def _measured(kernel: KernelCost, seconds: float) -> Measurement:
    # As prices ask for it: what is multiplied as tf32, where that is allowed.
    product = kernel.dtype == "float32" and "taps" in kernel.sizes
    return Measurement.of(replace(kernel, dtype="tf32") if product else kernel, seconds)


def _layers(runs: Sequence[Record]) -> dict[Layer, None]:
    """Return the convolutions of all models and layers of the runs."""
    found: dict[Layer, None] = {}
    for run in runs:
        for row in run["sections"].get("layers", ()):
            if "shape" in row:
                found[layer.BATCH, tuple(row["shape"]), "conv"] = None
        for name in dict.fromkeys(row["model"] for row in run["sections"].get("steps", ())):
            batch, side = gpu_steps.SIZES.get(name, gpu_steps.USUAL)
            for path, shape in _convolutions(build_model(name, image_size=side), side).items():
                found[batch, shape, path] = None
    return found


def _convolutions(model: nn.Module, side: int) -> dict[str, layer.Shape]:
    """Return the convolutions of a model by path; all have as much padding as `layer` has."""
    found: dict[str, layer.Shape] = {}

    def note(path: str, module: nn.Module, inputs: tuple[torch.Tensor, ...], _: object) -> None:
        assert isinstance(module, nn.Conv2d)
        kernel, stride = module.kernel_size[0], module.stride[0]
        assert module.padding == (kernel // 2,) * 2, module
        channels = module.in_channels, module.out_channels
        found[path] = (*channels, inputs[0].shape[-1], kernel, stride)

    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(partial(note, path))
    with torch.no_grad():
        model.to("meta")(torch.empty(2, 3, side, side, device="meta"))
    return found


def _site(
    x: tuple[int, ...], weight: tuple[int, ...], y: tuple[int, ...], gradient: Gradient,
    dtype: torch.dtype,
) -> Site:  # fmt: skip
    stride = -(-x[2] // y[2])
    shape = (x[1], weight[0], x[2], weight[2], stride)
    given = {
        name: torch.empty(size, dtype=dtype, device="meta")
        for name, size in (("input", x), ("weight", weight), ("grad", y))
    }
    return replace(layer.site(shape, given, gradient), device="cuda")


if __name__ == "__main__":
    main()
