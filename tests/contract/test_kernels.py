"""What every kernel promises: its C++ gives what its reference gives in float64.

Runs over the registry: a new file in `codegen/kernels/` is tested without an edit here.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from codegen import build, int8
from codegen.kernel import Kernel, Sample, Source, _Runner, cpp_source, kernels, register

# Roundings of one operand and of the result; the sum itself counts `length`.
ROUNDINGS = 4
THREADS = (1, 2, 3, 8)
_TILED = ("int8_forward", "int8_dgrad", "int8_wgrad", "int8_sampled_wgrad")

CASES = [
    pytest.param(kernel, sample, id=f"{kernel.name}-{number}")
    for kernel in kernels().values()
    for number, sample in enumerate(kernel.samples())
]
by_sample = pytest.mark.parametrize(("kernel", "sample"), CASES)

# What AMX has another way for.
IN_TILES = [case for case in CASES if case.id.rpartition("-")[0] in _TILED]

needs_compiler = pytest.mark.skipif(
    isinstance(build.toolchain(), str), reason="this machine has no C++ compiler"
)


@pytest.fixture(autouse=True)
def _nan_filled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill new memory with NaN, so that what a kernel forgets to write is seen."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _results(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _map(args: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    return tuple(change(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def _check(kernel: Kernel, sample: Sample, args: tuple[Any, ...], results: Any) -> None:
    expected = _results(kernel.reference(*_map(args, Tensor.double)))
    # What bounds the rounding error: the same sums of absolute values.
    bound = _results(kernel.reference(*_map(args, lambda a: a.double().abs())))
    for result, wanted, magnitude in zip(_results(results), expected, bound, strict=True):
        if not result.is_floating_point():
            assert torch.equal(result, wanted)
            continue
        finite = magnitude[magnitude.isfinite()]
        largest = float(
            torch.cat(
                [
                    finite.abs().flatten(),
                    wanted[wanted.isfinite()].abs(),
                    torch.zeros(1, dtype=torch.float64),
                ]
            ).max()
        )
        eps = torch.finfo(result.dtype).eps
        relative = sample.length * torch.finfo(torch.float32).eps + ROUNDINGS * eps
        torch.testing.assert_close(
            result.double(), wanted, atol=largest * relative, rtol=0, equal_nan=True
        )


@needs_compiler
@by_sample
def test_results_equal_the_reference_on_any_number_of_threads(
    kernel: Kernel, sample: Sample
) -> None:
    """In float64; operands are left as they were, and the same call gives the same bits."""
    args = sample.args()
    assert kernel.emit_cpp is None or not isinstance(kernel.emit_cpp(*args), str)
    before = _map(args, Tensor.clone)
    for threads in THREADS:
        torch.set_num_threads(threads)
        results = kernel.op(*args)
        _check(kernel, sample, args, results)
    _assert_same(_results(kernel.op(*args)), _results(results))
    _assert_same(args, before)


@needs_compiler
@pytest.mark.skipif(not int8.in_tiles(), reason="this processor has no AMX: there is one way")
@pytest.mark.parametrize(("kernel", "sample"), IN_TILES)
def test_without_amx_a_kernel_computes_the_same(
    kernel: Kernel, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes are multiplied exactly, in whatever registers."""
    args = sample.args()
    expected = kernel.op(*args)
    tools = build.toolchain()
    assert isinstance(tools, build.Toolchain)
    plain = dataclasses.replace(tools, amx=False)
    monkeypatch.setattr(build, "toolchain", lambda: plain)
    results = _Runner(kernel)(*args)
    _check(kernel, sample, args, results)
    if not kernel.name.endswith("wgrad"):  # sums over chunks of pixels are rounded
        _assert_same(_results(results), _results(expected))


@needs_compiler
@pytest.mark.skipif(int8.in_tiles(), reason="tested by running it")
@pytest.mark.parametrize("name", sorted({case.values[0].name for case in IN_TILES}))
def test_with_amx_a_kernel_compiles(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine whose processor cannot run it, too."""
    tools = build.toolchain()
    assert isinstance(tools, build.Toolchain)
    flags = (*tools.flags, "-mamx-tile", "-mamx-int8")
    tiled = dataclasses.replace(tools, amx=True, flags=flags, identity=tools.identity + "amx")
    monkeypatch.setattr(build, "toolchain", lambda: tiled)
    kernel = kernels()[name]
    source = cpp_source(kernel, *kernel.samples()[0].args())
    assert isinstance(source, Source)
    assert "_tile_loadd" in source.text
    build._compile(source.text, tmp_path / "kernel.so", tiled)
    assert (tmp_path / "kernel.so").exists()


def _assert_same(values: tuple[Any, ...], others: tuple[Any, ...]) -> None:
    for value, other in zip(values, others, strict=True):
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, other, atol=0, rtol=0, equal_nan=True)


@by_sample
def test_reference_and_fake_agree_on_shapes_types_and_strides(
    kernel: Kernel, sample: Sample
) -> None:
    args = sample.args()
    expected, fake = _results(kernel.reference(*args)), _results(kernel.fake(*args))
    for one, other in zip(expected, fake, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.parametrize("kernel", kernels().values(), ids=kernels().keys())
def test_the_operator_passes_torch_s_own_checks(kernel: Kernel) -> None:
    args = kernel.samples()[0].args()
    checks = ("test_schema", "test_faketensor")
    assert set(torch.library.opcheck(kernel.op, args, test_utils=checks).values()) == {"SUCCESS"}


def test_a_name_is_taken_once() -> None:
    kernel = next(iter(kernels().values()))
    with pytest.raises(ValueError, match=f"two kernels are called '{kernel.name}'"):
        register(dataclasses.replace(kernel))
