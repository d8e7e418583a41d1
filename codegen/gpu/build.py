"""From a program to a function: a file in the cache directory, imported, launched.

Triton reads a kernel's source back from its file, and compiles it when it is first launched, or
finds it in its own cache on disk. The file is named after the primitive and a hash of the text.
"""

import hashlib
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from codegen.cache import cache_dir, write_atomically
from codegen.gpu.source import Program


@cache
def toolchain() -> str | None:
    """Return why this machine has no Triton; None if it has."""
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
        _LOADED[path] = module
    return _LOADED[path]


_LOADED: dict[Path, ModuleType] = {}

# Told of every program that a graph is going to need, and of operands and results, which are fake:
# who has processors to spare may compile them meanwhile (`codegen.gpu.ahead.warm`).
LISTENERS: list[Callable[[str, Program, list[Tensor]], None]] = []


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
