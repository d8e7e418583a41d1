"""From a program to a function: a file in the cache directory, imported, launched.

Triton reads a kernel's source back from its file, and compiles it when it is first launched, or
finds it in its own cache on disk. The file is named after the primitive and a hash of the text.
"""

import hashlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from codegen.cache import cache_dir, write_atomically
from codegen.gpu.source import Program


@cache
def toolchain() -> str | None:
    """Return why no Triton of ours runs here; None if it does.

    `GRAPHPASS_TRITON=0` leaves it out: a short training is over before it is compiled.
    """
    if os.environ.get("GRAPHPASS_TRITON") == "0":
        return "GRAPHPASS_TRITON is 0"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return None


def path_of(name: str, program: Program) -> Path:
    """Return where a program's text is kept."""
    digest = hashlib.sha256(program.text.encode()).hexdigest()[:16]
    return cache_dir() / "triton" / f"{name}-{digest}.py"


def load(name: str, program: Program) -> ModuleType:
    """Return the program as a module; its file is written if it is not there."""
    path = path_of(name, program)
    if path not in _LOADED:
        if not path.exists() or path.read_text(encoding="utf-8") != program.text:
            write_atomically(path, program.text)
        spec = importlib.util.spec_from_file_location(f"approx_{path.stem.replace('-', '_')}", path)
        assert spec is not None and spec.loader is not None, path
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _launch_directly(module)
        _LOADED[path] = module
    return _LOADED[path]


_LOADED: dict[Path, ModuleType] = {}

# Told of the programs of every kernel that a graph is going to need, the best by prediction first,
# and of operands and results, which are fake: who has processors to spare may compile them
# meanwhile (`codegen.gpu.ahead.warm`).
LISTENERS: list[Callable[[str, tuple[Program, ...], list[Tensor]], None]] = []


# A program has no more threads than this: those of an AMD GPU, whose warps are twice as wide, would
# have too few registers each for the tiles of 8 warps, and spill.
_MOST_THREADS = 256


def fitted(options: Mapping[str, Any], lanes: int) -> dict[str, Any]:
    """Return the options of a launch, which are written for NVIDIA's GPUs, for any GPU.

    Args:
        options: constants of the launch, and options such as `num_warps`.
        lanes: threads of a warp.
    """
    given = dict(options)
    if "num_warps" in given:
        given["num_warps"] = min(given["num_warps"], _MOST_THREADS // lanes)
    return given


def roomy(options: Mapping[str, Any], lanes: int) -> dict[str, Any] | None:
    """Return the options with which a kernel that spilled is compiled again, or None: leave it.

    NVIDIA's assembler spills a few bytes where that makes place for one more program on a
    multiprocessor, which shared memory often has no place for.

    Args:
        options: those of `fitted`.
        lanes: threads of a warp.
    """
    # AMD's compiler has no such option; there, threads have 512 registers anyway.
    return None if lanes == _AMD_LANES else {**options, "maxnreg": _MOST_REGISTERS}


# Of a thread, on all of NVIDIA's GPUs.
_MOST_REGISTERS = 255
_AMD_LANES = 64
_LANES = _AMD_LANES if torch.version.hip else 32


class Launcher:
    """Launches a kernel: by Triton's own path first, then the binary that came of it.

    Triton looks at every argument and every constant of a kernel at each launch, which takes longer
    than many of the kernels do. Here all of them are known: but for pointers, which have to be
    multiples of 16 bytes as they were when the binary was made.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.direct = True
        self.binaries: dict[tuple[Any, ...], Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Return the function that launches so many programs."""
        return partial(self._launch, (*grid, 1, 1)[:3])

    def _launch(self, grid: tuple[int, ...], *tensors: Tensor, **given: Any) -> None:
        options = fitted(given, _LANES)
        if not self.direct or any(tensor.data_ptr() % 16 for tensor in tensors):
            self.kernel[grid](*tensors, **options)
            return
        key = (tensors[0].device, grid, *options.values())
        binary = self.binaries.get(key)
        if binary is None:
            binary = self.kernel[grid](*tensors, **options)
            if getattr(binary, "n_spills", 0) and (more := roomy(options, _LANES)) is not None:
                # What a kernel writes it does not read: running it once more changes nothing.
                binary = self.kernel[grid](*tensors, **more)
            self.binaries[key] = binary
            return
        constants = (options[name] for name in self.kernel.arg_names[len(tensors) :])
        try:
            binary[grid](*tensors, *constants)
        except (AttributeError, TypeError):
            # A Triton whose binaries are called in another way: nothing was launched.
            self.direct = False
            self.kernel[grid](*tensors, **options)


def _launch_directly(module: ModuleType) -> None:
    """Replace the kernels that `run` launches, but not the functions that they call."""
    if toolchain() is None:
        import triton

        for name in module.run.__code__.co_names:
            if isinstance(kernel := vars(module).get(name), triton.JITFunction):
                setattr(module, name, Launcher(kernel))


def launch(module: ModuleType, program: Program, tensors: list[Tensor]) -> None:
    """Run a loaded program.

    Args:
        module: the program as `load` returned it.
        program: the same.
        tensors: operands and results, on one device.
    """
    device = tensors[0].device
    scratch = [torch.empty(x.elements, dtype=x.dtype, device=device) for x in program.scratch]
    if device.type == "cuda":
        # Triton launches on the current device.
        with torch.cuda.device(device):
            module.run(*tensors, *scratch)
    else:
        module.run(*tensors, *scratch)
