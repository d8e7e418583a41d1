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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from benchmarks import gpu_sections, layer
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

    def announce(self, name: str, programs: tuple[Program, ...], tensors: list[Tensor]) -> None:
        """Compile programs that have not been announced before."""
        dtypes = [tensor.dtype for tensor in tensors]
        for program in programs:
            if program.text not in self.seen:
                self.seen.add(program.text)
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
    parser.add_argument("names", nargs="+", choices=tuple(layer.NAMED))
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = parser.parse_args(argv)
    gpu_sections.allow_tf32()
    # A run that tries the flow without a GPU interprets kernels; what is warmed is compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    with Warmer(given.arch, given.workers) as warmer:
        shapes = [shape for name in given.names for shape in layer.NAMED[name]]
        for record in (*announce(shapes), *warmer.wait()):
            print(json.dumps(record), flush=True)


def announce(
    shapes: Iterable[layer.Shape], dtypes: Sequence[str] = tuple(layer.DTYPES)
) -> Iterator[dict[str, Any]]:
    """Trace every method on every layer with fake tensors on a GPU.

    Yields:
        What failed.
    """
    for shape in shapes:
        for dtype in (layer.DTYPES[name] for name in dtypes):
            with FakeTensorMode(), ByOperators():
                operands = _fake(shape, dtype)
                for gradient in layer.GRADIENTS:
                    for name in layer.METHODS:
                        try:
                            _trace(shape, operands, gradient, name)
                        except Exception:
                            failed = traceback.format_exc()[-1500:]
                            yield {"trace": [name, gradient.value, *shape], "failed": failed}


class ByOperators(TorchFunctionMode):
    """Slices and copies by operators: as methods they ask for a GPU that such a torch has not."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if not any(isinstance(part, Tensor | list) for part in index):
                return _sliced(args[0], index)
        if func is Tensor.contiguous:
            return torch.ops.aten.clone(
                args[0], memory_format=(kwargs or {}).get("memory_format", torch.contiguous_format)
            )
        return func(*args, **(kwargs or {}))


def _sliced(x: Tensor, index: tuple[Any, ...]) -> Tensor:
    left_out = x.dim() - sum(part is not None and part is not Ellipsis for part in index)
    axis = 0
    for part in index:
        if part is Ellipsis:
            axis += left_out
        elif part is None:
            x, axis = x.unsqueeze(axis), axis + 1
        elif isinstance(part, slice):
            x = torch.ops.aten.slice(x, axis, part.start, part.stop, part.step or 1)
            axis += 1
        else:
            x = torch.ops.aten.select(x, axis, part)
    return x


def _fake(shape: layer.Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    last = torch.channels_last
    return {
        name: torch.empty(size, dtype=dtype, device="cuda", memory_format=last)
        for name, size in layer.sizes(shape, layer.BATCH).items()
    }


def _trace(shape: layer.Shape, operands: dict[str, Tensor], gradient: Gradient, name: str) -> None:
    method, params = layer.method_of(name)
    site = layer.site(shape, operands, gradient)
    if layer.has_form(method, site, params):
        seed = torch.zeros((), dtype=torch.int64, device="cuda")
        layer.lower(method, params, site, operands, seed)


if __name__ == "__main__":
    main()
