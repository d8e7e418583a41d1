"""A kernel primitive: its meaning in plain torch, its C++ and Triton, and the registry.

A primitive is one file in `codegen/kernels/`. It is registered as `torch.ops.approx.<name>`, an
operator without side effects that the compiler leaves where it is.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from codegen import build
from codegen.gpu import build as gpu_build
from codegen.gpu import choice, tiles
from codegen.gpu.source import Program, tf32_settings

Result = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """Emitted C++.

    Attributes:
        text: a translation unit that defines `extern "C" void graphpass_kernel(void** t)`; `t`
            holds the tensor arguments in order, then the results, then the scratch memory.
        scratch_bytes: size of the scratch memory, aligned to 64 bytes; 0 for none.
    """

    text: str
    scratch_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """Arguments that the contract tests call a kernel with.

    Attributes:
        args: makes the arguments.
        length: how many products the longest sum of a result has.
        exact: whether the C++ must give the reference's very bits.
    """

    args: Callable[[], tuple[Any, ...]]
    length: int
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Kernel:
    """One primitive.

    All functions take the operator's arguments. `fake` and the emitters read nothing of tensors but
    shape, strides, dtype and device.

    Attributes:
        name: the operator is `torch.ops.approx.<name>`; also the name of the file.
        schema: arguments and results as `torch.library` writes them.
        reference: plain and obvious torch: the meaning, and what runs where no kernel can.
        fake: allocates the results, uninitialised.
        samples: arguments for the contract tests.
        emit_cpp: returns the source specialised to the arguments, or why there is none. Left out
            where a CPU is served best by the reference: plain torch and the vendor's library.
        emit_triton: the same for a GPU.
    """

    name: str
    schema: str
    reference: Callable[..., Result]
    fake: Callable[..., Result]
    samples: Callable[[], tuple[Sample, ...]]
    emit_cpp: Callable[..., Source | str] | None = None
    emit_triton: Callable[..., Program | str] | None = None

    @property
    def op(self) -> Any:
        """The operator."""
        return getattr(torch.ops.approx, self.name).default


_REGISTRY: dict[str, Kernel] = {}
_LIBRARY = Library("approx", "FRAGMENT")


def register(kernel: Kernel) -> Kernel:
    """Add a kernel to the registry, and its operator to torch.

    Raises:
        ValueError: if the name is taken.
    """
    if kernel.name in _REGISTRY:
        raise ValueError(f"two kernels are called {kernel.name!r}")
    _REGISTRY[kernel.name] = kernel
    # The source is specialised to strides: the compiler must pass those it was traced with.
    tags = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
    _LIBRARY.define(kernel.name + kernel.schema, tags=tags)
    # One operator for both devices: a cached graph holds nothing but its name, and CUDA graphs
    # record what it launches. NOTE [Why no triton_op]: a `triton_op` in a joint graph is either as
    # opaque as this, or its kernels are traced into the graph, and then what the compiler caches
    # refers to a table of this process.
    _LIBRARY.impl(kernel.name, _Runner(kernel), "CPU")
    _LIBRARY.impl(kernel.name, _GpuRunner(kernel), "CUDA")
    torch.library.register_fake(f"approx::{kernel.name}", kernel.fake, lib=_LIBRARY)
    return kernel


@cache
def kernels() -> MappingProxyType[str, Kernel]:
    """Return every kernel by name, in alphabetical order."""
    import codegen.kernels  # noqa: F401  (importing the folder registers its files)

    return MappingProxyType(dict(sorted(_REGISTRY.items())))


def call(kernel: Kernel, *args: Any) -> Any:
    """Call a kernel from code that is being traced: its operator where it can be built.

    Elsewhere the reference is traced in place, so that the compiler fuses it.
    """
    if unavailable(kernel, *args) is None:
        return kernel.op(*args)
    return kernel.reference(*args)


def unavailable(kernel: Kernel, *args: Any) -> str | None:
    """Return why nothing can be built for these arguments; None where it can, and begin.

    Args:
        kernel: the primitive.
        *args: its arguments; tensors may be fake.
    """
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    devices = {tensor.device.type for tensor in tensors}
    if not devices <= {"cpu"} and not devices <= {"cuda"}:
        return "not on a CPU or a GPU"
    if any(not isinstance(size, int) for x in tensors for size in (*x.shape, *x.stride())):
        return "the sizes are symbolic"
    if devices == {"cuda"}:
        programs = triton_programs(kernel, *args)
        if isinstance(programs, str):
            return programs
        _announce(kernel, programs, args)
        return None
    tools = build.toolchain()
    if isinstance(tools, str):
        return tools
    source = cpp_source(kernel, *args)
    if isinstance(source, str):
        return source
    build.start(source.text)
    return None


def missing_toolchain() -> str:
    """Return why no kernel can be built on this machine; "" where some can."""
    if torch.cuda.is_available():
        return gpu_build.toolchain() or ""
    tools = build.toolchain()
    return tools if isinstance(tools, str) else ""


def _announce(kernel: Kernel, programs: tuple[Program, ...], args: tuple[Any, ...]) -> None:
    for listener in gpu_build.LISTENERS:
        results = kernel.fake(*args)
        outputs = (results,) if isinstance(results, Tensor) else results
        tensors = [arg for arg in (*args, *outputs) if isinstance(arg, Tensor)]
        listener(kernel.name, programs, tensors)


def cpp_source(kernel: Kernel, *args: Any) -> Source | str:
    """Return the C++ for these arguments, or why there is none."""
    if kernel.emit_cpp is None:
        return f"{kernel.name} is not written in C++"
    return kernel.emit_cpp(*args)


def triton_program(kernel: Kernel, *args: Any) -> Program | str:
    """Return the Triton for these arguments, or why there is none."""
    if (reason := gpu_build.toolchain()) is not None:
        return reason
    if kernel.emit_triton is None:
        return f"{kernel.name} is not written in Triton"
    return kernel.emit_triton(*args)


def triton_programs(kernel: Kernel, *args: Any) -> tuple[Program, ...] | str:
    """Return the Triton worth timing, what is predicted to be fastest first, or why there is none.

    They differ in how they cut a product into tiles, or have it multiplied by the vendor's library.
    """
    found: list[Program] = []
    for rank in range(tiles.GATHERED + 1):
        with tiles.ranked(rank):
            program = triton_program(kernel, *args)
        if isinstance(program, str):
            return program
        if program not in found:
            found.append(program)
    return tuple(found)


def _key(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what a kernel is specialised to."""
    key: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            key += (arg.shape, arg.stride(), arg.dtype)
        else:
            key.append(tuple(arg) if isinstance(arg, list) else arg)
    return tuple(key)


def _warn(kernel: Kernel, reason: str) -> None:
    # A training run is not lost for it: the reference computes the same, slowly.
    message = f"graphpass: {kernel.name} runs in plain torch: {reason}"
    warnings.warn(message, UserWarning, stacklevel=3)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What a call for known shapes needs: a small layer's kernels take no longer than finding out.

    Attributes:
        launch: the C++.
        scratch_bytes: of its memory.
        results: sizes, strides and type of what it computes.
        single: whether that is one tensor, and not a tuple.
    """

    launch: build.Launch
    scratch_bytes: int
    results: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]
    single: bool


class _Runner:
    """Runs a kernel on real tensors: the C++ for their shapes, or else the reference."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.launches: dict[tuple[Any, ...], _Prepared | None] = {}

    def __call__(self, *args: Any) -> Result:
        key = _key(args)
        try:
            prepared = self.launches[key]
        except KeyError:
            prepared = self.launches[key] = self._prepare(args)
        if prepared is None:
            return self.kernel.reference(*args)
        outputs = [
            torch.empty_strided(size, stride, dtype=dtype)
            for size, stride, dtype in prepared.results
        ]
        pointers = [x.data_ptr() for x in args if isinstance(x, Tensor)]
        pointers += [x.data_ptr() for x in outputs]
        if prepared.scratch_bytes:
            scratch = torch.empty(prepared.scratch_bytes + 64, dtype=torch.uint8)
            pointers.append(-(-scratch.data_ptr() // 64) * 64)
        prepared.launch(pointers)
        return outputs[0] if prepared.single else tuple(outputs)

    def _prepare(self, args: tuple[Any, ...]) -> _Prepared | None:
        if unavailable(self.kernel, *args) is not None:
            return None
        source = cpp_source(self.kernel, *args)
        assert isinstance(source, Source), source
        try:
            launch = build.start(source.text).result()
        except (build.KernelBuildError, OSError) as error:
            _warn(self.kernel, str(error))
            return None
        results = self.kernel.fake(*args)
        single = isinstance(results, Tensor)
        outputs = (results,) if isinstance(results, Tensor) else results
        shapes = tuple((x.shape, x.stride(), x.dtype) for x in outputs)
        return _Prepared(launch, source.scratch_bytes, shapes, single)


class _GpuRunner:
    """Runs a kernel on a GPU: the fastest Triton for the arguments' shapes, or the reference.

    The reference is what plain torch and the vendor's library make of it. It runs where there is no
    Triton, and where it is faster.
    """

    def __init__(self, kernel: Kernel, timer: choice.Timer = choice.seconds_of) -> None:
        self.kernel = kernel
        self.timer = timer
        # By what Triton is specialised to; None for the reference.
        self.programs: dict[tuple[Any, ...], tuple[ModuleType, Program] | None] = {}

    def __call__(self, *args: Any) -> Result:
        key = (*_key(args), tf32_settings())
        if key not in self.programs:
            self.programs[key] = self._prepare(args)
        prepared = self.programs[key]
        if prepared is None:
            return self.kernel.reference(*args)
        return run_program(self.kernel, *prepared, *args)

    def _prepare(self, args: tuple[Any, ...]) -> tuple[ModuleType, Program] | None:
        programs = triton_programs(self.kernel, *args)
        if isinstance(programs, str):
            return None
        name = self.kernel.name
        by_file = {gpu_build.path_of(name, program).name: program for program in programs}
        ways = {file: partial(self._run, by_file[file], args) for file in by_file}
        try:
            if _is_recording():
                # Nothing can be timed while a CUDA graph is recorded.
                return gpu_build.load(name, programs[0]), programs[0]
            ways[_REFERENCE] = partial(self.kernel.reference, *args)
            path = gpu_build.path_of(name, programs[0])
            outcome = choice.fastest(path, ways, choice.machine(), self.timer)
        except Exception as error:
            _warn(self.kernel, str(error))
            return None
        if not by_file.keys() & outcome.seconds.keys():
            _warn(self.kernel, next(iter(outcome.failed.values())))
        chosen = by_file.get(outcome.fastest)
        return None if chosen is None else (gpu_build.load(name, chosen), chosen)

    def _run(self, program: Program, args: tuple[Any, ...]) -> Result:
        """Launch a program, which compiles it where that was not done."""
        return run_program(self.kernel, gpu_build.load(self.kernel.name, program), program, *args)


# The way of plain torch, among files of programs.
_REFERENCE = "torch"


def _is_recording() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def run_program(kernel: Kernel, module: ModuleType, program: Program, *args: Any) -> Result:
    """Allocate the results of a kernel, and launch its program."""
    results = kernel.fake(*args)
    outputs = (results,) if isinstance(results, Tensor) else results
    tensors = [x for x in args if isinstance(x, Tensor)]
    gpu_build.launch(module, program, [*tensors, *outputs])
    return results
