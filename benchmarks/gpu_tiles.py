"""Other tiles than the predicted ones, timed on a GPU; a section of `benchmarks.gpu`.

    python -m benchmarks.gpu_tiles --arch 90

Prints a line of JSON for each tile, and which one the prediction chose.
"""

import argparse
import json
import os
import statistics
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import gpu_timing
from benchmarks.gpu_sections import allow_tf32
from benchmarks.gpu_warm import Warmer
from codegen import int8
from codegen.gpu import build as gpu_build
from codegen.gpu import products, weight_gradient
from codegen.gpu.source import Program
from codegen.kernel import Kernel, kernels, run_program, triton_program

# Channels in and out, side of the map; 3x3, batch 128, bfloat16.
SHAPES = ((64, 64, 32), (256, 256, 8), (128, 128, 28))
KEEP = 0.25
# Rows, columns, contracted values of a tile, and programs that share the pixels of a gradient.
FORWARD = ((64, 64, 64), (128, 64, 64), (128, 128, 64), (128, 128, 128), (128, 256, 64))
WEIGHT = tuple(
    (high, wide, deep, splits)
    for high, wide, deep in ((64, 64, 64), (128, 64, 64), (128, 128, 64), (128, 128, 128))
    for splits in (1, 4, 16)
)


def main(argv: Sequence[str] | None = None) -> None:
    """Compile every candidate, then time them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tiles", description=__doc__)
    parser.add_argument("--arch", type=int, default=90)
    given = parser.parse_args(argv)
    allow_tf32()
    candidates = list(_candidates())
    with Warmer(given.arch, os.cpu_count() or 1) as warmer:
        for kernel, args, _, program in candidates:
            warmer.announce(kernel.name, program, _tensors(kernel, args))
        for record in warmer.wait():
            print(json.dumps(record), flush=True)
    for kernel, args, label, program in candidates:
        record = {"kernel": kernel.name, "shape": list(args[0].shape), "tile": label}
        try:
            module = gpu_build.load(kernel.name, program)

            def run(kernel: Kernel = kernel, args: Any = args, program: Program = program,
                    module: Any = module) -> object:  # fmt: skip
                return run_program(kernel, module, program, *args)

            seconds = gpu_timing.times({"run": run}, "cuda", turns=5)["run"]
            record["s"] = statistics.median(seconds)
        except Exception:
            record["failed"] = traceback.format_exc()[-1500:]
        print(json.dumps(record), flush=True)
        if "illegal" in str(record.get("failed", "")):
            return


def _candidates() -> Iterator[tuple[Kernel, tuple[Any, ...], str, Program]]:
    for shape in SHAPES:
        for name, args in _problems(shape).items():
            kernel = kernels()[name]
            tiles = FORWARD if name == "int8_dgrad" else WEIGHT
            for tile in (None, *tiles):
                with ExitStack() as stack:
                    if tile is not None:
                        for patch in _patches(tile):
                            stack.enter_context(patch)
                    program = triton_program(kernel, *args)
                if isinstance(program, Program):
                    label = "predicted" if tile is None else "x".join(map(str, tile))
                    yield kernel, args, label, program


def _patches(tile: tuple[int, ...]) -> list[Any]:
    high, wide, deep, *splits = tile
    size = {"BM": high, "BN": wide}
    if splits:
        cut = ({**size, "BK": deep}, splits[0])
        return [mock.patch.object(weight_gradient, "_cut", lambda *_: cut)]
    depths = {1: (32, deep), 2: (16, deep), 4: (16, deep)}
    return [
        mock.patch.object(products, "tiles", lambda *_: dict(size)),
        mock.patch.object(products, "_DEPTHS", depths),
    ]


def _problems(shape: tuple[int, int, int]) -> dict[str, tuple[Any, ...]]:
    """Return the arguments of each kernel for a layer."""
    channels, filters, side = shape
    size, out = [128, channels, side, side], [128, filters, side, side]
    axes = ([3, 3], [1, 1], [1, 1], [1, 1])
    last = torch.channels_last

    def bytes_of(shape: list[int], border: int) -> Tensor:
        count = shape[0] * (shape[2] + 2 * border) * (shape[3] + 2 * border) * shape[1]
        return torch.randint(0, 256, (count + int8.SLACK,), dtype=torch.uint8, device="cuda")

    scale = torch.ones((), device="cuda")
    grad, x, weight = bytes_of(out, 1), bytes_of(size, 1), bytes_of([filters, channels, 3, 3], 0)
    sizes = (out, size, *axes, 1)
    image = torch.randn(size, device="cuda").to(torch.bfloat16, memory_format=last)
    gradient = torch.randn(out, device="cuda").to(torch.bfloat16, memory_format=last)
    rows = int(KEEP * 128 * side * side)
    index = torch.randint(128 * side * side, (rows,), device="cuda").sort().values
    ones, mean = torch.ones(rows, device="cuda"), torch.zeros(channels, device="cuda")
    sums = torch.zeros(filters, 3, 3, device="cuda")
    return {
        "int8_dgrad": (grad, weight, scale, scale, *sizes, torch.bfloat16, True),
        "int8_wgrad": (grad, x, scale, scale, *sizes, True),
        "sampled_wgrad": (gradient, image, index, ones, mean, sums, *axes, 1, True),
    }


def _tensors(kernel: Kernel, args: tuple[Any, ...]) -> list[Tensor]:
    results = kernel.fake(*args)
    outputs = (results,) if isinstance(results, Tensor) else results
    return [x for x in (*args, *outputs) if isinstance(x, Tensor)]


if __name__ == "__main__":
    main()
