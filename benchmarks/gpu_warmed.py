"""Run a program while processes beside it compile the Triton that it is about to need.

    python -m benchmarks.gpu_warmed examples.cifar10 --device cuda --method int8

On a GPU a kernel is compiled when it is first called, one after the other. Here each is compiled
as soon as its graph has been traced, while the program goes on to compile the rest of the step.
"""

import importlib
import sys
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from benchmarks.gpu_warm import Warmer

WORKERS = 3


def main(argv: Sequence[str] | None = None) -> None:
    """Run the module named first with the arguments that follow."""
    program, *arguments = sys.argv[1:] if argv is None else argv
    run = importlib.import_module(program).main
    with _warmer() if torch.cuda.is_available() else nullcontext():
        run(arguments)


def _warmer() -> Warmer:
    major, minor = torch.cuda.get_device_capability()
    return Warmer(10 * major + minor, WORKERS)


if __name__ == "__main__":
    main()
