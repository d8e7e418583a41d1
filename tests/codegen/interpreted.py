"""Run every sample of every kernel in Triton's interpreter; a program of its own.

    TRITON_INTERPRET=1 python -m tests.codegen.interpreted [kernel ...]

The interpreter must be chosen before Triton is imported, and stays chosen: hence a process for it.
Prints a line of JSON a sample: kernel, number, and what went wrong ("" for nothing).
"""

import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from codegen import int8
from codegen.gpu import build, target
from codegen.gpu.source import Program
from codegen.kernel import Kernel, Sample, kernels, run_program, triton_programs
from tests.contract.test_kernels import _check, _map

# Large for a program that interprets, by their grids mostly. Run when their kernel is named.
SLOW = {
    ("int8_dgrad", 5), ("int8_dgrad", 6), ("int8_forward", 4), ("int8_forward", 5),
    ("int8_wgrad", 6), ("pruned_dgrad", 4), ("pruned_dgrad", 5), ("pruned_dgrad", 6),
    ("pruned_wgrad", 6),
}  # fmt: skip


def main() -> None:
    """Print the outcome of every sample."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
    warnings.filterwarnings("ignore", "overflow encountered", RuntimeWarning)
    torch.set_num_threads(1)
    # What a kernel forgets to write is seen as NaN.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    # Programs are those of an H100 whatever GPU there is.
    target.architecture = lambda: "sm_90"
    for kernel, number, zero in cases(sys.argv[1:]):
        start = time.perf_counter()
        try:
            with mock.patch.object(int8, "zero_point", lambda device, zero=zero: zero):
                wrong = run(kernel, kernel.samples()[number])
        except Exception:
            wrong = traceback.format_exc()
        seconds = time.perf_counter() - start
        print(json.dumps([kernel.name, number, zero, wrong, round(seconds, 2)]), flush=True)


def cases(names: list[str]) -> Iterator[tuple[Kernel, int, int]]:
    """Yield kernel, number of the sample, and the byte that stands for zero."""
    for kernel in kernels().values():
        if kernel.emit_triton is not None and (not names or kernel.name in names):
            for number in range(len(kernel.samples())):
                if not names and (kernel.name, number) in SLOW:
                    continue
                # Both formats of bytes, the GPU's more often.
                zero = 128 if number % 4 == 3 else 0
                yield kernel, number, zero


def run(kernel: Kernel, sample: Sample) -> str:
    """Return what is wrong with a kernel's results: of the first tiles, and without any."""
    args = tuple(map(_half, sample.args()))
    programs = triton_programs(kernel, *args)
    if isinstance(programs, str):
        return programs
    gathered = [program for program in programs if "def gather(" in program.text]
    for program in (programs[0], *gathered):
        _run(kernel, sample, args, program)
    return ""


def _run(kernel: Kernel, sample: Sample, args: tuple[Any, ...], program: Program) -> None:
    before = _map(args, Tensor.clone)
    module = build.load(kernel.name, program)
    results = run_program(kernel, module, program, *args)
    finite = all(bool(x.isfinite().all()) for x in args if _is_float(x))
    if kernel.name == "pruned_dgrad" and not finite:
        # A zero of a border times an infinite weight is NaN: such samples have a few more, as they
        # have with the vendor's library.
        results = _without_new_nans(results, kernel.reference(*_map(args, Tensor.double)))
    _check(kernel, sample, args, results)
    for value, other in zip(args, before, strict=True):
        if isinstance(value, Tensor):
            assert torch.equal(value.nan_to_num(), other.nan_to_num()), "an operand was written"


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _without_new_nans(results: Any, wanted: Any) -> Any:
    if not isinstance(results, Tensor):
        return tuple(map(_without_new_nans, results, wanted))
    if not results.is_floating_point():
        return results
    return torch.where(results.isnan(), wanted.to(results.dtype), results)


def _half(value: Any) -> Any:
    """Return float16 for bfloat16, whose products the interpreter does not know."""
    if isinstance(value, Tensor) and value.dtype is torch.bfloat16:
        return value.to(torch.float16, memory_format=torch.preserve_format)
    return torch.float16 if value is torch.bfloat16 else value


if __name__ == "__main__":
    main()
