"""From C++ source to a function: compiled once for this machine, kept on disk, loaded afterwards.

The file name is a hash of source, compiler, flags and processor, so that a home directory shared
by different machines holds a library for each. Two processes that build the same source at once
both succeed: each compiles into a file of its own and moves it into place.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock

import torch

from codegen import amx
from codegen.cache import cache_dir, write_atomically

# What a compiled kernel is called with: one pointer a tensor.
Launch = Callable[[Sequence[int]], None]
ENTRY = "graphpass_kernel"
# Every source begins with these.
HEADERS = """\
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
"""


class KernelBuildError(RuntimeError):
    """A bug of ours, or a broken compiler: emitted source did not compile; names the file."""


@dataclass(frozen=True, slots=True)
class Toolchain:
    """The compiler of this machine.

    Attributes:
        path: the program.
        identity: version of the compiler, flags and processor: what decides the machine code.
        flags: its arguments.
        avx512: whether the processor has AVX-512 (F, BW, DQ, VL).
        bf16: whether it multiplies bfloat16 (AVX512-BF16).
        vnni: whether it multiplies int8 (AVX512-VNNI).
        amx: whether it multiplies int8 in tiles (AMX), and this process may.
    """

    path: str
    identity: str
    flags: tuple[str, ...]
    avx512: bool
    bf16: bool
    vnni: bool
    amx: bool


@cache
def toolchain() -> Toolchain | str:
    """Return this machine's compiler, or why there is none."""
    path = next(filter(None, map(shutil.which, _candidates())), None)
    if path is None:
        return f"no C++ compiler was found (looked for {', '.join(_candidates())}; set CXX)"
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    if version.returncode != 0 or platform.system() != "Linux":
        return f"{path} does not work here"
    features = _cpu_features()
    flags = _flags()
    identity = "\n".join((version.stdout.splitlines()[0], *flags, *sorted(features)))
    return Toolchain(
        path,
        identity,
        flags,
        avx512={"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= features,
        bf16="avx512_bf16" in features,
        vnni="avx512_vnni" in features,
        amx=amx.available(path, flags, features),
    )


def library_path(source: str, tools: Toolchain) -> Path:
    """Return where the library of a source is kept."""
    digest = _digest(tools.identity, torch.__version__, source)
    return cache_dir() / "kernels" / f"{digest}.so"


def start(source: str) -> "Future[Launch]":
    """Begin to build a source in the background; the same source is built once.

    The future's result raises `KernelBuildError` if the compiler refuses the source.
    """
    if source not in _STARTED:
        _STARTED[source] = _pool().submit(_build, source)
    return _STARTED[source]


def wait() -> None:
    """Wait until everything begun is built, or has failed."""
    for future in list(_STARTED.values()):
        future.exception()


_STARTED: dict[str, "Future[Launch]"] = {}


def _build(source: str) -> Launch:
    tools = toolchain()
    assert isinstance(tools, Toolchain), tools
    path = library_path(source, tools)
    if not path.exists():
        _compile(source, path, tools)
    try:
        function = getattr(ctypes.CDLL(str(path)), ENTRY)
    except (OSError, AttributeError):
        # Cut short by a full disk, say: build it anew, once.
        path.unlink(missing_ok=True)
        _compile(source, path, tools)
        function = getattr(ctypes.CDLL(str(path)), ENTRY)
    function.restype = None

    def launch(pointers: Sequence[int]) -> None:
        function((ctypes.c_void_p * len(pointers))(*pointers))

    return launch


def _compile(source: str, path: Path, tools: Toolchain) -> None:
    text = path.with_suffix(".cpp")
    write_atomically(text, source)
    temporary = path.parent / f".{uuid.uuid4().hex}.so"
    shared = prepare(path.parent, tools)
    command = [tools.path, *tools.flags, *shared, str(text), "-o", str(temporary)]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode != 0:
            raise KernelBuildError(f"{text} does not compile:\n{finished.stderr[:4000]}")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def prepare(folder: Path, tools: Toolchain) -> list[str]:
    """Compile what all kernels share, once a folder, and return the arguments that use it."""
    with _PREPARING:
        return _compiled_headers(folder, tools) + _torch_library(folder, tools)


_PREPARING = Lock()


def _compiled_headers(folder: Path, tools: Toolchain) -> list[str]:
    """Return arguments that bring in the standard headers, compiled once with GCC.

    Reading them takes 0.3 s, which is a third of what a kernel takes. The header itself is empty:
    where GCC does not take the compiled form, the source includes what it needs.
    """
    if "clang" in tools.identity:
        return []
    header = folder / f"{_digest(tools.identity, HEADERS)}.h"
    if not header.exists():
        write_atomically(header, "")
    compiled = _prepared(header.with_suffix(".h.gch"), HEADERS, tools, "-x", "c++-header")
    return ["-include", str(header)] if compiled.exists() else []


def _torch_library(folder: Path, tools: Toolchain) -> list[str]:
    """Return arguments that make a kernel's library load torch's, for its functions and threads.

    The linker would look through all names of torch's library, which takes 0.2 s, half of what a
    kernel takes. It needs to know none of them: it is given an empty library that is called the
    same, and the loader finds torch's own in its place, as torch is there already.
    """
    torchs = Path(torch.__file__).parent / "lib"
    empty = folder / f"empty-{_digest(tools.identity)}" / "libtorch_cpu.so"
    _prepared(empty, "", tools, f"-Wl,-soname,{empty.name}", "-x", "c++")
    found = empty.parent if empty.exists() else torchs
    return [f"-L{found}", "-Wl,--no-as-needed", "-ltorch_cpu", f"-Wl,-rpath,{torchs}"]


def _prepared(path: Path, text: str, tools: Toolchain, *flags: str) -> Path:
    """Compile `text` where that was not done; where the compiler refuses, `path` is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        source = path.parent / f".{uuid.uuid4().hex}.h"
        built = Path(f"{source}.built")
        command = [tools.path, *tools.flags, *flags, str(source), "-o", str(built)]
        try:
            source.write_text(text)
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                built.replace(path)
        finally:
            source.unlink(missing_ok=True)
            built.unlink(missing_ok=True)
    return path


@cache
def _pool() -> ThreadPoolExecutor:
    # Each thread waits for a compiler: as many as there are cores.
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="graphpass-build")


def _candidates() -> list[str]:
    given = os.environ.get("CXX")
    return [given] if given else ["g++", "clang++", "c++"]


def _flags() -> tuple[str, ...]:
    return (
        "-O3",
        "-march=native",
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-fopenmp",
        # What exact code would not do either: errno, traps. NaN and infinity stay what they are.
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=fast",
        "-Wno-psabi",
    )


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _cpu_features() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(flags.partition(":")[2].split())
