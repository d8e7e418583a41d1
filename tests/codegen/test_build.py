"""Building C++: once, kept on disk, safe against other processes, and loud when it fails."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from codegen import build, cpp
from codegen.cache import cache_dir, write_atomically
from codegen.kernel import Source, _Runner, call, kernels, unavailable

pytestmark = pytest.mark.skipif(
    isinstance(build.toolchain(), str), reason="this machine has no C++ compiler"
)

BODY = """
static void kernel(void* const* t) {
  float* x = static_cast<float*>(t[0]);
  for (long i = 0; i < COUNT; i++) x[i] += STEP;
}
"""
SOURCE = cpp.source({"COUNT": 5, "STEP": 0.5}, BODY)


@pytest.fixture(autouse=True)
def folder(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Start with no kernel built, in memory or on disk."""
    monkeypatch.setattr(build, "_STARTED", {})
    build.toolchain.cache_clear()
    yield fresh_cache / "kernels"
    build.toolchain.cache_clear()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    done: list[Path] = []
    compile_source = build._compile

    def count(source: str, path: Path, tools: build.Toolchain) -> None:
        done.append(path)
        compile_source(source, path, tools)

    monkeypatch.setattr(build, "_compile", count)
    return done


def _suffixes(folder: Path) -> list[str]:
    """Return the files of a folder beside the compiled headers."""
    files = (path.suffix for path in folder.iterdir() if path.is_file())
    return sorted(suffix for suffix in files if suffix not in {".h", ".gch"})


def _run(source: str) -> list[float]:
    x = torch.zeros(5)
    build.start(source).result()([x.data_ptr()])
    return x.tolist()


def test_a_source_is_compiled_once(compilations: list[Path]) -> None:
    assert _run(SOURCE) == [0.5] * 5
    assert _run(SOURCE) == [0.5] * 5
    assert len(compilations) == 1


def test_the_next_process_compiles_nothing(
    compilations: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(SOURCE)
    monkeypatch.setattr(build, "_STARTED", {})
    assert _run(SOURCE) == [0.5] * 5
    assert len(compilations) == 1


def test_sources_that_differ_in_a_constant_do_not_meet(compilations: list[Path]) -> None:
    other = cpp.source({"COUNT": 3, "STEP": 0.5}, BODY)
    assert _run(other) == [0.5, 0.5, 0.5, 0, 0] and _run(SOURCE) == [0.5] * 5
    assert len(set(compilations)) == 2


def test_source_stands_beside_its_library_and_nothing_else_does(folder: Path) -> None:
    _run(SOURCE)
    assert _suffixes(folder) == [".cpp", ".so"]
    (text,) = folder.glob("*.cpp")
    assert text.read_text() == SOURCE


def test_compiled_headers_are_a_matter_of_speed_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(SOURCE)
    for compiled in folder.glob("*.gch"):
        # GCC passes over what is no compiled header, without a word.
        assert compiled.read_bytes().startswith(b"gpch")
        compiled.write_text("cut short")
    other = cpp.source({"COUNT": 4, "STEP": 0.5}, BODY)
    assert _run(other) == [0.5, 0.5, 0.5, 0.5, 0]


def test_a_library_that_was_cut_short_is_built_anew(
    compilations: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = build.toolchain()
    assert isinstance(tools, build.Toolchain)
    write_atomically(build.library_path(SOURCE, tools), "not a library")
    assert _run(SOURCE) == [0.5] * 5
    assert len(compilations) == 1


def test_processes_may_build_the_same_source_at_once(folder: Path) -> None:
    program = (
        "import torch; from codegen import build; from tests.codegen.test_build import SOURCE, _run"
        "; print(_run(SOURCE))"
    )
    command = [sys.executable, "-c", program]
    root = Path(__file__).parent.parent.parent
    running = [
        subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for process in running:
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and printed.strip() == str([0.5] * 5)
    assert _suffixes(folder) == [".cpp", ".so"]


def test_a_source_that_does_not_compile_is_our_bug_and_names_the_file(folder: Path) -> None:
    with pytest.raises(build.KernelBuildError, match=rf"{folder}.*\.cpp does not compile"):
        build.start("this is no C++").result()
    assert not list(folder.glob("*.so"))


def test_a_kernel_that_does_not_build_warns_and_runs_in_plain_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = kernels()["top_patches"]
    broken = dataclasses.replace(kernel, emit_cpp=lambda *args: Source("no C++"))
    args = kernel.samples()[0].args()
    run = _Runner(broken)
    with pytest.warns(UserWarning, match="top_patches runs in plain torch: .* does not compile"):
        first = run(*args)
    # Once: the next call neither builds nor warns.
    assert torch.equal(run(*args), first) and torch.equal(first, kernel.reference(*args))


def _without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    build.toolchain.cache_clear()


def test_without_a_compiler_the_reference_is_traced_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = kernels()["top_patches"]
    args = kernel.samples()[0].args()
    expected = kernel.reference(*args)
    _without_compiler(monkeypatch)
    assert "no-such-compiler" in str(unavailable(kernel, *args))
    assert torch.equal(call(kernel, *args), expected)
    # A graph from the cache may still hold the operator.
    fresh = [arg[..., ::2].contiguous() if isinstance(arg, torch.Tensor) else arg for arg in args]
    assert torch.equal(kernel.op(*fresh), kernel.reference(*fresh))


def test_a_compiler_that_does_not_run_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    build.toolchain.cache_clear()
    assert str(build.toolchain()).endswith("false does not work here")


def test_other_devices_and_symbolic_sizes_have_no_kernel() -> None:
    kernel = kernels()["top_patches"]
    args = kernel.samples()[0].args()
    moved = [arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in args]
    assert unavailable(kernel, *moved) == "not on a CPU or a GPU"
    doubles = [arg.double() if isinstance(arg, torch.Tensor) else arg for arg in args]
    assert unavailable(kernel, *doubles) == "no kernel for float64"


def test_the_cache_directory_is_where_the_user_says(folder: Path) -> None:
    assert cache_dir() == folder.parent
