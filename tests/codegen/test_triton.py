"""Triton without a GPU: every kernel in the interpreter, machine code for three GPUs, the texts."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from codegen import int8
from codegen.gpu import ahead, target
from codegen.gpu import build as gpu_build
from codegen.gpu.source import Program
from codegen.kernel import Kernel, _GpuRunner, call, kernels, triton_program, unavailable
from tests.codegen.interpreted import cases

ROOT = Path(__file__).parent.parent.parent
GOLDEN = Path(__file__).parent / "golden"
WRITTEN = [kernel for kernel in kernels().values() if kernel.emit_triton is not None]
# One process of the interpreter for all of them.
one_worker = pytest.mark.xdist_group("triton")
needs_triton = pytest.mark.skipif(
    gpu_build.toolchain() is not None, reason=gpu_build.toolchain() or "Triton is here"
)


def test_triton_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHPASS_TRITON", "0")
    assert gpu_build.toolchain.__wrapped__() == "GRAPHPASS_TRITON is 0"


@pytest.fixture(scope="module")
def interpreted() -> dict[tuple[str, int], str]:
    """Return what went wrong with each sample of each kernel in the interpreter."""
    command = [sys.executable, "-m", "tests.codegen.interpreted"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    lines = (json.loads(line) for line in finished.stdout.splitlines() if line.startswith("["))
    return {(name, number): wrong for name, number, _, wrong, _ in lines}


@needs_triton
@one_worker
@pytest.mark.parametrize(
    ("name", "number"), [(kernel.name, number) for kernel, number, _ in cases([])]
)
def test_results_equal_the_reference(
    name: str, number: int, interpreted: dict[tuple[str, int], str]
) -> None:
    """In Triton's interpreter, against float64, in float32 and float16, memory full of NaN."""
    wrong = interpreted[name, number]
    if wrong.startswith("no Triton for"):
        pytest.skip(wrong)
    assert not wrong, wrong


def _tensors(kernel: Kernel, args: tuple[Any, ...]) -> list[Tensor]:
    results = kernel.fake(*args)
    outputs = (results,) if isinstance(results, Tensor) else results
    return [x for x in (*args, *outputs) if isinstance(x, Tensor)]


def _compiled(name: str, args: tuple[Any, ...], machine: tuple[str, Any, int]) -> list[Any]:
    from triton.backends.compiler import GPUTarget

    kernel = kernels()[name]
    program = triton_program(kernel, *args)
    assert isinstance(program, Program), program
    dtypes = [tensor.dtype for tensor in _tensors(kernel, args)]
    return [
        ahead.compile_for(launch, GPUTarget(*machine))
        for launch in ahead.launches(name, program, dtypes)
        if launch.kernel.__name__ == "product"
    ]


def _bytes(gradient: str) -> tuple[Any, ...]:
    size = [32, 128, 16, 16]
    sizes = (size, size, [3, 3], [1, 1], [1, 1], [1, 1], 1)
    given = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)
    scales = torch.empty(()), torch.empty(())
    kinds = (torch.bfloat16, True) if gradient == "input" else (True,)
    return *given, *scales, *sizes, *kinds


# Stride, padding, dilation.
_AXES = ([1, 1], [1, 1], [1, 1])


def _floats(product: str, own: bool) -> tuple[Any, ...]:
    given, _, first, second, *sizes = _bytes("weight")[:-1]
    formats = (torch.float8_e5m2fnuz, torch.float8_e4m3fnuz) if own else (
        torch.float8_e5m2, torch.float8_e4m3fn
    )  # fmt: skip
    return given, given, first, second, *formats, product, *sizes, torch.bfloat16, True


def _rows() -> tuple[Any, ...]:
    image = torch.empty(32, 128, 16, 16, dtype=torch.bfloat16, memory_format=torch.channels_last)
    index, weight = torch.empty(2048, dtype=torch.int64), torch.empty(2048)
    sums = torch.empty(128, 3, 3)
    return image, image, index, weight, torch.empty(128), sums, [3, 3], *_AXES, 1, True


def _listed() -> tuple[Any, ...]:
    image, weight = _rows()[0], torch.empty(128, 128, 3, 3, dtype=torch.bfloat16)
    index = torch.empty(1, 32, dtype=torch.int64)
    return image, weight, index, torch.empty(1, 32), list(image.shape), *_AXES, 1, True


def _masked() -> tuple[Any, ...]:
    image = _rows()[0]
    return image, image, torch.empty(()), [3, 3], *_AXES, 1


def _masked_filters() -> tuple[Any, ...]:
    """What the assembler for an A100 spills unless it may take all registers."""
    size = [128, 64, 8, 8]
    image = torch.empty(size, dtype=torch.bfloat16, memory_format=torch.channels_last)
    weight = torch.empty(64, 64, 3, 3, dtype=torch.bfloat16, memory_format=torch.channels_last)
    return image, weight, torch.empty(()), size, *_AXES, 1, False


def _pruned() -> tuple[Any, ...]:
    """In float32, which is multiplied as tf32 and takes registers for it."""
    grad = torch.empty(32, 128, 32, 32, memory_format=torch.channels_last)
    weight = torch.empty(128, 128, 3, 3, memory_format=torch.channels_last)
    size = [32, 128, 32, 32]
    draw = torch.empty(()), torch.empty((), dtype=torch.int64)
    return grad, weight, *draw, size, [1, 1], [1, 1], [1, 1], 1, 0, 1


PRODUCTS = {
    "int8_dgrad": (lambda: _bytes("input"), ("s32.s8.s8", "mfma_i32")),
    "int8_wgrad": (lambda: _bytes("weight"), ("s32.s8.s8", "mfma_i32")),
    "masked_product": (_masked_filters, ("f32.bf16.bf16", "mfma_f32")),
    "masked_wgrad": (_masked, ("f32.bf16.bf16", "mfma_f32")),
    "sampled_channels": (_listed, ("f32.bf16.bf16", "mfma_f32")),
    "sampled_wgrad": (_rows, ("f32.bf16.bf16", "mfma_f32")),
    "pruned_dgrad": (_pruned, ("f32.tf32.tf32", "mfma_f32")),
}


@needs_triton
@one_worker
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize(
    "machine", [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)], ids=lambda m: str(m[1])
)
def test_products_use_tensor_cores_and_spill_nothing(
    name: str, machine: tuple[str, Any, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled ahead of time, in the largest tiles; a GPU would refuse too much shared memory."""
    monkeypatch.setattr(int8, "zero_point", lambda device: 0)
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "tf32")
    args, (nvidia, amd) = PRODUCTS[name]
    for compiled in _compiled(name, args(), machine):
        text = compiled.asm["ptx" if machine[0] == "cuda" else "amdgcn"]
        wanted = {80: r"mma\.sync\S*", 90: r"wgmma\.mma_async\S*"}.get(machine[1])
        assert re.search(f"{wanted}{nvidia}" if wanted else f"v_{amd}", text)
        registers, spilled = ahead.usage(compiled)
        assert 32 <= registers <= (255 if machine[0] == "cuda" else 512) and not spilled
        # Of an A100 and more; of the least AMD GPU.
        assert compiled.metadata.shared <= (163 << 10 if machine[0] == "cuda" else 64 << 10)


FLOATS = {
    ("cuda", 89, 32): r"mma\.sync\S*f32\.e5m2\.e4m3",
    ("cuda", 90, 32): r"wgmma\.mma_async\S*f32\.e5m2\.e4m3",
    # The compiler exchanges the operands, to write rows of the result.
    ("hip", "gfx942", 64): r"v_mfma_f32_\w+_(fp8_bf8|bf8_fp8)",
}


@needs_triton
@one_worker
@pytest.mark.parametrize("product", ["forward", "input", "weight"])
@pytest.mark.parametrize("machine", FLOATS, ids=lambda machine: str(machine[1]))
def test_8_bit_floats_are_multiplied_as_they_are(
    product: str, machine: tuple[str, Any, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In gfx942's formats there; on sm_90, results are waited for before they are added up."""
    cuda = machine[0] == "cuda"
    name = f"sm_{machine[1]}" if cuda else machine[1]
    monkeypatch.setattr(target, "architecture", lambda: name)
    for compiled in _compiled("fp8_product", _floats(product, not cuda), machine):
        text = compiled.asm["ptx" if cuda else "amdgcn"]
        assert re.search(FLOATS[machine], text)
        if machine[1] == 90:
            waited = r"wgmma\.wait_group\S*\s+0;"
            loop = re.split(r"wgmma\.mma_async", text)[-1]
            assert re.search(waited, loop.partition("add.f32")[0])


@pytest.mark.parametrize("kernel", WRITTEN, ids=lambda kernel: kernel.name)
def test_text_is_what_was_approved(
    kernel: Kernel, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pytest --update-golden` approves what is emitted now."""
    monkeypatch.setattr(target, "architecture", lambda: "sm_90")
    assert kernel.emit_triton is not None
    program = kernel.emit_triton(*kernel.samples()[0].args())
    assert isinstance(program, Program), program
    path = GOLDEN / f"{kernel.name}.txt"
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(program.text, encoding="utf-8")
    assert program.text == path.read_text(encoding="utf-8")
    compile(program.text, str(path), "exec")


@pytest.mark.parametrize("kernel", WRITTEN, ids=lambda kernel: kernel.name)
def test_nothing_is_added_in_the_order_of_arrival(kernel: Kernel) -> None:
    """What programs share is summed by another launch, in order: the same call, the same bits."""
    assert kernel.emit_triton is not None
    for sample in kernel.samples():
        program = kernel.emit_triton(*sample.args())
        assert isinstance(program, str) or "atomic" not in program.text


def _sizes(value: Any) -> list[int]:
    """Return the shape that an argument has, or is."""
    return [*value.shape] if isinstance(value, Tensor) else value if isinstance(value, list) else []


def _with_samples(value: Any, batch: int, more: int) -> Any:
    """Return an image, or the sizes of one, with more samples than `batch`; others as they are."""
    sizes = _sizes(value)
    if len(sizes) != 4 or sizes[0] != batch:
        return value
    if isinstance(value, list):
        return [more, *sizes[1:]]
    layout = torch.channels_last if value.stride(1) == 1 else torch.contiguous_format
    large = torch.empty((more, *sizes[1:]), dtype=value.dtype, device="meta", memory_format=layout)
    return large


@pytest.mark.parametrize("kernel", WRITTEN, ids=lambda kernel: kernel.name)
def test_positions_beyond_31_bits_are_numbered_in_64(kernel: Kernel) -> None:
    """Images of 2^31 elements; those that a kernel cannot number it refuses."""
    assert kernel.emit_triton is not None
    args = kernel.samples()[0].args()
    images = [sizes for sizes in map(_sizes, args) if len(sizes) == 4]
    for batch, *sizes in images[:1]:
        more = 1 + (1 << 31) // prod(sizes)
        program = kernel.emit_triton(*(_with_samples(value, batch, more) for value in args))
        if isinstance(program, Program):
            assert "INDEX = tl.constexpr(tl.int64)" in program.text
        else:
            assert "that are too" in program


def _cuda(*shape: int) -> Tensor:
    return torch.empty(shape, device="cuda", memory_format=torch.channels_last)


def _round_args() -> tuple[Any, ...]:
    number = torch.empty((), device="cuda")
    return _cuda(2, 8, 4, 4), number, number.to(torch.int64), 5, [0, 0], [0, 0]


@needs_triton
def test_a_graph_on_a_gpu_holds_the_operator() -> None:
    kernel = kernels()["int8_round"]
    with FakeTensorMode():
        args = _round_args()
        assert unavailable(kernel, *args) is None
        traced = torch.fx.experimental.proxy_tensor.make_fx(
            lambda x, scale, seed: call(kernel, x, scale, seed, *args[3:])
        )(*args[:3])
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called == [kernel.op]


def test_without_triton_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    gpu_build.toolchain.cache_clear()
    try:
        with FakeTensorMode():
            reason = unavailable(kernels()["int8_round"], *_round_args())
        assert str(reason).startswith("Triton cannot be imported")
    finally:
        gpu_build.toolchain.cache_clear()


def _once(run: Callable[[], object]) -> float:
    run()
    return 1.0


@needs_triton
def test_a_program_that_fails_warns_and_plain_torch_runs() -> None:
    kernel = kernels()["absolute_max"]
    broken = dataclasses.replace(kernel, emit_triton=lambda x: Program("def run(*_): 1 / 0\n"))
    run, x = _GpuRunner(broken, _once), torch.arange(-5.0, 3.0)
    with pytest.warns(UserWarning, match="absolute_max runs in plain torch: division by zero"):
        assert run(x) == 5
    # Once: the next call neither tries nor warns.
    assert run(x) == 5


@needs_triton
def test_a_program_lies_in_a_file_named_after_kernel_and_text() -> None:
    program = Program("def run(): return 7\n")
    module = gpu_build.load("absolute_max", program)
    path = gpu_build.path_of("absolute_max", program)
    assert module.run() == 7
    assert path.name.startswith("absolute_max-") and path.read_text() == program.text


def test_every_program_that_a_graph_needs_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_build, "toolchain", lambda: None)
    heard: list[tuple[str, list[torch.dtype]]] = []

    def hear(name: str, programs: tuple[Program, ...], tensors: list[Tensor]) -> None:
        assert len(programs) == 1
        heard.append((name, [tensor.dtype for tensor in tensors]))

    monkeypatch.setattr(gpu_build, "LISTENERS", [hear])
    with FakeTensorMode():
        assert unavailable(kernels()["int8_round"], *_round_args()) is None
    assert heard == [
        ("int8_round", [torch.float32, torch.float32, torch.int64, torch.uint8]),
    ]


class _Binary(dict[Any, Any]):
    """Stands in for a compiled kernel: what launches it, by grid."""

    n_spills = 0


class _Kernel:
    """Stands in for a jitted function: notes what is launched, and how."""

    arg_names = ("x", "out", "WIDTH")

    def __init__(self, call: Callable[..., None] | None = None, spills: int = 0) -> None:
        self.noted: list[tuple[Any, ...]] = []
        self.call = call
        self.spills = spills

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def compile_and_launch(*tensors: Tensor, **options: Any) -> Any:
            self.noted.append(("compiled", grid, options))
            binary = _Binary({grid: self.call or self.launch})
            binary.n_spills = 0 if "maxnreg" in options else self.spills
            return binary

        return compile_and_launch

    def launch(self, *arguments: Any) -> None:
        self.noted.append(("launched", arguments[2:]))


def _launch_twice(kernel: _Kernel, x: Tensor) -> None:
    launcher = gpu_build.Launcher(kernel)
    for _ in range(2):
        launcher[(4,)](x, x, num_warps=8, WIDTH=3)


def test_a_kernel_is_launched_directly_once_it_is_compiled() -> None:
    kernel = _Kernel()
    _launch_twice(kernel, torch.zeros(64))
    compiled = ("compiled", (4, 1, 1), {"num_warps": 8, "WIDTH": 3})
    assert kernel.noted == [compiled, ("launched", (3,))]


def test_a_kernel_that_spills_is_compiled_again_with_all_registers() -> None:
    kernel = _Kernel(spills=2)
    _launch_twice(kernel, torch.zeros(64))
    given = {"num_warps": 8, "WIDTH": 3}
    first, again, launched = kernel.noted
    assert first == ("compiled", (4, 1, 1), given)
    assert again == ("compiled", (4, 1, 1), {**given, "maxnreg": 255})
    assert launched == ("launched", (3,))


def test_other_pointers_than_it_was_compiled_for_are_left_to_triton() -> None:
    kernel = _Kernel()
    _launch_twice(kernel, torch.zeros(64)[1:])
    assert [how for how, *_ in kernel.noted] == ["compiled"] * 2


def test_binaries_that_are_called_in_another_way_are_left_to_triton() -> None:
    kernel = _Kernel(call=lambda: None)
    _launch_twice(kernel, torch.zeros(64))
    assert [how for how, *_ in kernel.noted] == ["compiled"] * 2
