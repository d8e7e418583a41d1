"""Sections of `benchmarks.gpu`, each a process of its own: a kernel that fails takes none along.

    python -m benchmarks.gpu_sections correct int8_round --device cuda

A section prints lines of JSON, one a result, as soon as it has it.
"""

import argparse
import json
import os
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import gpu_timing, layer
from benchmarks.gpu_alone import alone, choosing_alone
from codegen import int8
from codegen.gpu import build as gpu_build
from codegen.gpu.source import BYTES
from codegen.kernel import Kernel, kernels, run_program, triton_programs
from graphpass import pricing
from graphpass.capture import Analysis
from graphpass.site import Gradient

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Run one section."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_sections", description=__doc__)
    parser.add_argument("section", choices=("machine", "correct", "layers"))
    parser.add_argument("names", nargs="*", help="kernels to check, or layers")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--skip", nargs="*", default=[], help="rows that broke an earlier process")
    given = parser.parse_args(argv)
    allow_tf32()
    # A kernel that falls back to plain torch must not be timed as if it had run.
    warnings.filterwarnings("error", message="graphpass:")
    sections: dict[str, Callable[[], Iterator[Record]]] = {
        "machine": lambda: machine(given.device),
        "correct": lambda: correct(given.names, given.device),
        "layers": lambda: layers(given.names, given.device, given.skip),
    }
    with choosing_alone():
        for record in sections[given.section]():
            print(json.dumps(record), flush=True)


def allow_tf32() -> None:
    """Let float32 be multiplied as tf32, as training on such a machine does."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True


def machine(device: str) -> Iterator[Record]:
    """Yield machine, versions, and the two ceilings."""
    from examples.results import environment

    record: Record = {**environment(), "triton": gpu_build.toolchain() or _triton_version()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        record |= {
            "gpu": properties.name, "capability": list(torch.cuda.get_device_capability(0)),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory, "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
        yield record
        record = {"bandwidth_bytes_per_s": gpu_timing.bandwidth_bytes_per_s()}
        for name, dtype in {**layer.DTYPES, "int8": torch.int8}.items():
            record[f"peak_{name}_flops_per_s"] = gpu_timing.peak_flops_per_s(dtype)
        record |= _host_s()
    yield record


def _host_s() -> Record:
    """Return what the host takes for a call, of kernels that take less."""
    shape = (64, 64, 8, 3, 1)
    given = layer.operands(shape, 8, torch.bfloat16, "cuda")
    x = given["input"]
    runs: dict[str, Callable[[], object]] = {
        "absolute_max": lambda: torch.ops.approx.absolute_max(x),
        "pixel_norms": lambda: torch.ops.approx.pixel_norms(
            given["grad"], [8, 8], [3, 3], [1, 1], [1, 1], [1, 1], 1
        ),
        "exact": layer.exact(shape, given, [Gradient.WEIGHT]),
        "add": lambda: x + x,
    }
    return {f"host_{name}_s": gpu_timing.host_s(run) for name, run in runs.items()}


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def correct(names: Sequence[str], device: str) -> Iterator[Record]:
    """Compare kernels with their references.

    Yields:
        For each sample of the kernels named, the largest error against float64.
    """
    for name in names:
        kernel = kernels()[name]
        with mock.patch.object(
            int8, "zero_point", lambda _: 0 if device == "cuda" or _interpreted() else 128
        ):
            for number in range(len(kernel.samples())):
                start = time.perf_counter()
                record = {"kernel": name, "sample": number}
                for form in ("given", "half", "tf32"):
                    yield {**record, "form": form, "begun": True}
                    try:
                        result = _error(kernel, number, device, form)
                    except Exception:
                        result = {"failed": traceback.format_exc()[-4000:]}
                    yield {**record, "form": form, **result, "s": time.perf_counter() - start}
                    if "illegal" in str(result.get("failed", "")):
                        return


def _error(kernel: Kernel, number: int, device: str, form: str) -> Record:
    """Return the error of a sample as given, in float16 instead of bfloat16, or in tf32."""
    sample = kernel.samples()[number]
    args = sample.args()
    if form == "half":
        compiled = device == "cpu" and not _interpreted()
        if compiled or not any(_is(arg, torch.bfloat16) for arg in args):
            return {"none": "no bfloat16 in it, or no kernel for float16"}
        args = tuple(map(_half, args))
    if form == "tf32" and (device == "cpu" or not any(_is(arg, torch.float32) for arg in args)):
        return {"none": "no float32 in it"}
    if form == "given" and _interpreted() and any(_is(arg, torch.bfloat16) for arg in args):
        return {"none": "the interpreter cannot multiply bfloat16"}
    precision = "tf32" if form == "tf32" else "ieee"
    settings: Any = torch.backends.cudnn
    settings.conv.fp32_precision = precision
    torch.set_float32_matmul_precision("high" if form == "tf32" else "highest")
    moved = tuple(arg.to(device) if isinstance(arg, Tensor) else arg for arg in args)
    outcomes = _run(kernel, moved)
    if isinstance(outcomes, str):
        return {"none": outcomes}
    wanted = _tuple(kernel.reference(*_map(args, Tensor.double)))
    bound = _tuple(kernel.reference(*_map(args, lambda x: x.double().abs())))
    error, allowed = 0.0, 0.0
    given = [result.cpu() for results in outcomes for result in _tuple(results)]
    ways = len(outcomes)
    for result, expected, size in zip(given, wanted * ways, bound * ways, strict=True):
        if not result.is_floating_point():
            error = max(error, float((result != expected).sum()))
            continue
        finite = expected.isfinite() & size.isfinite()
        if bool((~result[expected.isnan()].isnan()).any()):
            return {"failed": "NaN was lost"}
        # A zero of the border times an infinite weight is NaN: such samples have a few more.
        finite &= result.isfinite() if not _all_finite(args) else True
        largest = float(
            torch.cat([size[finite].abs(), expected[finite].abs(), torch.zeros(1)]).max()
        )
        eps = torch.finfo(result.dtype).eps
        relative = sample.length * torch.finfo(torch.float32).eps + 4 * eps
        coarse = max(2e-3 if form == "tf32" else 0, 2**-13 if _has_bytes(args) else 0)
        allowed = max(allowed, coarse + relative)
        difference = (result.double() - expected)[finite].abs()
        if bool(difference.isnan().any()):
            return {"failed": "a result is NaN"}
        error = max(
            error, float(difference.max() if difference.numel() else 0) / max(largest, 1e-30)
        )
    return {"error": error, "allowed": allowed, "passed": error <= allowed, "programs": ways}


def _run(kernel: Kernel, args: tuple[Any, ...]) -> list[Any] | str:
    """Return the results of every program that may be chosen, or of the C++."""
    on_cpu = any(isinstance(arg, Tensor) and arg.device.type == "cpu" for arg in args)
    if on_cpu and not _interpreted():
        return [kernel.op(*args)]
    programs = triton_programs(kernel, *args)
    if isinstance(programs, str):
        return programs
    # Not the operator, which would fall back to plain torch and tell nobody.
    results = [
        run_program(kernel, gpu_build.load(kernel.name, program), program, *args)
        for program in programs
    ]
    if not on_cpu:
        torch.cuda.synchronize()
    return results


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def layers(names: Sequence[str], device: str, skip: Sequence[str]) -> Iterator[Record]:
    """Yield seconds of every product of the layers named, exact and by every method."""
    batch = layer.BATCH if device == "cuda" else 2
    for dtype in ("bf16", "fp32"):
        for shape in (shape for name in names for shape in layer.NAMED[name]):
            for gradient in layer.GRADIENTS:
                label = "-".join(map(str, (dtype, *shape, gradient.value)))
                yield {"row": label, "begun": True}
                operands = layer.operands(shape, batch, layer.DTYPES[dtype], device)
                for name in layer.METHODS:
                    if f"{label}-{name}" in skip:
                        continue
                    yield {"row": label, "method": name, "begun": f"{label}-{name}"}
                    try:
                        record = _layer(shape, operands, gradient, name, device)
                    except Exception:
                        record = {"failed": traceback.format_exc()[-4000:]}
                    if record:
                        yield {"row": label, "dtype": dtype, "shape": list(shape),
                               "gradient": gradient.value, "method": name, **record}  # fmt: skip
                    if "illegal" in str(record.get("failed", "")):
                        return


def _layer(
    shape: layer.Shape, operands: dict[str, Tensor], gradient: Gradient, name: str, device: str
) -> Record:
    method, params = layer.method_of(name)
    site = layer.site(shape, operands, gradient)
    if not layer.has_form(method, site, params):
        return {}
    prices = pricing.of(Analysis((), device=device), torch.get_num_threads())
    predicted = prices.exact(site).seconds, prices.approximate(site, method, params).seconds
    seed = torch.zeros((), dtype=torch.int64, device=device)
    lowered = partial(layer.lower, method, params, site, operands, seed)
    mine = lowered()
    with mock.patch.object(gpu_build, "toolchain", lambda: "switched off"):
        plain = lowered() if device == "cuda" else mine
    # The same draws, in plain torch: what the kernels should give but for rounding.
    difference = float((mine.double() - plain.double()).norm() / plain.double().norm())
    runs: dict[str, layer.Run] = {"exact": layer.exact(shape, operands, [gradient]), name: lowered}
    for run in runs.values():
        run()
    with alone():
        seconds = gpu_timing.times(runs, device)
        parts = _parts(lowered, device)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    return {
        "exact_s": medians["exact"], "method_s": medians[name],
        "predicted_exact_s": predicted[0], "predicted_method_s": predicted[1],
        "times_faster": medians["exact"] / medians[name], "difference": difference,
        "spread": [min(seconds[name]), max(seconds[name])], "parts": parts,
    }  # fmt: skip


def _parts(lowered: Callable[[], Tensor], device: str) -> list[Record]:
    """Return the seconds of each of our operators that a method calls."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if func.namespace == "approx":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Note():
        lowered()
    parts = []
    for number, (func, args) in enumerate(calls):
        name = f"{number}:{func.name().removeprefix('approx::')}"
        seconds = gpu_timing.times({name: partial(func, *args)}, device, turns=3)
        parts.append({"operator": name, "s": statistics.median(seconds[name])})
    return parts


def _tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _is(value: Any, dtype: torch.dtype) -> bool:
    return (isinstance(value, Tensor) and value.dtype is dtype) or value is dtype


def _has_bytes(args: tuple[Any, ...]) -> bool:
    """Return whether 8-bit floats are multiplied: tensor cores keep 14 bits of their sums."""
    return any(isinstance(arg, torch.dtype) and arg in BYTES for arg in args)


def _half(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype is torch.bfloat16:
        return value.half()
    return torch.float16 if value is torch.bfloat16 else value


def _map(args: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    return tuple(change(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def _all_finite(args: tuple[Any, ...]) -> bool:
    tensors = (arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point())
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


if __name__ == "__main__":
    main()
