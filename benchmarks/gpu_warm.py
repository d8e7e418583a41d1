"""Compile the Triton of many layers at once, on all processors, into Triton's cache on disk.

    python -m benchmarks.gpu_warm ga resnet50 --arch 90

Needs no GPU: operands are fake. Prints lines of JSON: what did not compile, and the count.
"""

import argparse
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import gpu_sections
from codegen.gpu import ahead
from codegen.gpu import build as gpu_build
from codegen.gpu.source import Program
from graphpass.site import Gradient


class Warmer:
    """A pool that compiles every program that is announced while it is open."""

    def __init__(self, arch: int, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(workers, mp_context=context)
        self.arch = arch
        self.running: dict[Future[int], str] = {}
        self.seen: set[str] = set()

    def __enter__(self) -> "Warmer":
        """Begin to listen."""
        gpu_build.LISTENERS.append(self.announce)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop listening, and drop what has not begun."""
        gpu_build.LISTENERS.remove(self.announce)
        self.pool.shutdown(wait=False, cancel_futures=True)

    def announce(self, name: str, program: Program, tensors: list[Tensor]) -> None:
        """Compile a program unless it has been announced before."""
        if program.text not in self.seen:
            self.seen.add(program.text)
            dtypes = [tensor.dtype for tensor in tensors]
            future = self.pool.submit(ahead.warm, name, program, dtypes, self.arch)
            self.running[future] = f"{name}: {program.text.splitlines()[0]}"

    def wait(self) -> Iterator[dict[str, Any]]:
        """Yield what did not compile, and at the end how many kernels did."""
        start, count = time.perf_counter(), 0
        for future in as_completed(self.running):
            try:
                count += future.result()
            except Exception:
                yield {"program": self.running[future], "failed": traceback.format_exc()[-3000:]}
        programs = len(self.seen)
        yield {"programs": programs, "kernels": count, "waited_s": time.perf_counter() - start}


def main(argv: Sequence[str] | None = None) -> None:
    """Compile what the layers named need."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_warm", description=__doc__)
    parser.add_argument("names", nargs="+", choices=("ga", "resnet50", "tiny"))
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = parser.parse_args(argv)
    gpu_sections.allow_tf32()
    with Warmer(given.arch, given.workers) as warmer:
        for record in (*announce(given.names), *warmer.wait()):
            print(json.dumps(record), flush=True)


def announce(
    names: Sequence[str], dtypes: Sequence[str] = tuple(gpu_sections.DTYPES)
) -> Iterator[dict[str, Any]]:
    """Trace every method on every layer named with fake tensors on a GPU.

    Yields:
        What failed.
    """
    shapes: list[tuple[int, ...]] = [(*s, 3, 1) for s in gpu_sections.GA] if "ga" in names else []
    shapes += gpu_sections.RESNET50 if "resnet50" in names else ()
    shapes += [(16, 32, 8, 3, 2)] if "tiny" in names else ()
    for shape in shapes:
        for dtype in (gpu_sections.DTYPES[name] for name in dtypes):
            with FakeTensorMode():
                operands = _fake(shape, dtype)
                for gradient in gpu_sections.GRADIENTS:
                    for name in gpu_sections.METHODS:
                        try:
                            _trace(shape, operands, gradient, name)
                        except Exception:
                            failed = traceback.format_exc()[-1500:]
                            yield {"trace": [name, gradient.value, *shape], "failed": failed}


def _fake(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    channels, filters, size, kernel, stride = shape
    out = (size + 2 * (kernel // 2) - kernel) // stride + 1
    shapes = {
        "grad": (128, filters, out, out),
        "input": (128, channels, size, size),
        "weight": (filters, channels, kernel, kernel),
    }
    last = torch.channels_last
    return {
        name: torch.empty(sizes, dtype=dtype, device="cuda", memory_format=last)
        for name, sizes in shapes.items()
    }


def _trace(
    shape: tuple[int, ...], operands: dict[str, Tensor], gradient: Gradient, name: str
) -> None:
    method, params = gpu_sections._method(name)
    site = gpu_sections._site(shape, operands, gradient)
    rejected = method.reject(site, params)
    if gradient in method.gradients and (rejected is None or rejected.reason.name == "NOT_CHEAPER"):
        gpu_sections._lowered(method, params, site, operands)()


if __name__ == "__main__":
    main()
