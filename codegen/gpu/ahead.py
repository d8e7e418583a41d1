"""Compile programs without launching them: for other processors' sakes, or before they are needed.

A program's `run` is called with stand-ins for its kernels, which note what would be launched.
"""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codegen.gpu import build
from codegen.gpu.source import Program

_POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16",
    torch.float16: "*fp16", torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a program's `run`.

    Attributes:
        kernel: the jitted function.
        grid: programs along each axis.
        dtypes: of the tensors it is called with.
        options: constants of this launch, and options such as `num_warps`.
    """

    kernel: Any
    grid: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    options: dict[str, Any]


def launches(name: str, program: Program, dtypes: Sequence[torch.dtype]) -> list[Launch]:
    """Return what a program launches.

    Args:
        name: of the primitive.
        program: its Triton.
        dtypes: of operands and results.
    """
    module = build.load(name, program)
    noted: list[Launch] = []

    class Stand:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def note(*tensors: Tensor, **options: Any) -> None:
                types = tuple(tensor.dtype for tensor in tensors)
                noted.append(Launch(self.kernel, tuple(grid), types, options))

            return note

    launchers = {k: v for k, v in vars(module).items() if isinstance(v, build.Launcher)}
    types = (*dtypes, *(scratch.dtype for scratch in program.scratch))
    try:
        vars(module).update({name: Stand(each.kernel) for name, each in launchers.items()})
        module.run(*(torch.empty(0, dtype=dtype, device="meta") for dtype in types))
    finally:
        vars(module).update(launchers)
    return noted


def compile_for(launch: Launch, target: Any) -> Any:
    """Return a launch's kernel compiled for a `triton.backends.compiler.GPUTarget`.

    Pointers are taken to be multiples of 16 bytes, as those of torch's tensors are. What spills is
    compiled again as `build.Launcher` would.
    """
    options = build.fitted(launch.options, target.warp_size)
    compiled = _compiled(launch, options, target)
    if usage(compiled)[1] and (more := build.roomy(options, target.warp_size)) is not None:
        return _compiled(launch, more, target)
    return compiled


def _compiled(launch: Launch, options: dict[str, Any], target: Any) -> Any:
    import triton
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    tensors, constants = names[: len(launch.dtypes)], names[len(launch.dtypes) :]
    signature = {name: _POINTERS[dtype] for name, dtype in zip(tensors, launch.dtypes, strict=True)}
    source = ASTSource(
        fn=launch.kernel,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs={(names.index(name),): options[name] for name in constants},
        attrs={(number,): [["tt.divisibility", 16]] for number in range(len(tensors))},
    )
    rest = {name: value for name, value in options.items() if name not in constants}
    return triton.compile(source, target=target, options=rest)


def usage(compiled: Any) -> tuple[int, int]:
    """Return registers of a thread, and bytes that it spills, of what `compile_for` returned."""
    if "amdgcn" in compiled.asm:
        # A thread's registers are those of a lane; each has four bytes.
        text = compiled.asm["amdgcn"]
        return _number(text, r"\.vgpr_count:\s+"), 4 * _number(text, r"\.vgpr_spill_count:\s+")
    import triton

    # Triton brings the assembler's tools along.
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _number(text, "REG:"), _number(text, "LOCAL:") + _number(text, "STACK:")


def _number(text: str, before: str) -> int:
    found = re.search(rf"{before}(\d+)", text)
    assert found is not None, f"no {before} in {text[:500]}"
    return int(found[1])


def warm(name: str, program: Program, dtypes: Sequence[torch.dtype], arch: int) -> int:
    """Fill Triton's cache on disk with what a program will launch on an NVIDIA GPU.

    For worker processes: it replaces the process's driver by one that has no GPU.

    Args:
        name: of the primitive.
        program: its Triton.
        dtypes: of operands and results.
        arch: compute capability, 90 for 9.0.

    Returns:
        How many kernels that were.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import MockTensor

    class Driver:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    triton.runtime.driver.set_active(Driver())
    noted = launches(name, program, dtypes)
    for launch in noted:
        tensors = [MockTensor(dtype) for dtype in launch.dtypes]
        compiled = launch.kernel.warmup(*tensors, grid=launch.grid, **launch.options)
        if usage(compiled)[1] and (more := build.roomy(launch.options, 32)) is not None:
            launch.kernel.warmup(*tensors, grid=launch.grid, **more)
    return len(noted)
