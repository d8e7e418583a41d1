"""On a GPU: every kernel against float64, and a training step that is compiled with them."""

import dataclasses
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphpass
from codegen import fp8, int8
from codegen.gpu import build as gpu_build
from codegen.gpu.source import Program
from codegen.kernel import Kernel, Sample, kernels, run_program, triton_programs
from graphpass.backend import approx
from tests.contract.test_kernels import _check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        gpu_build.toolchain() is not None, reason=gpu_build.toolchain() or "Triton is here"
    ),
]
CASES = [
    pytest.param(kernel, sample, id=f"{kernel.name}-{number}")
    for kernel in kernels().values()
    for number, sample in enumerate(kernel.samples())
    if kernel.emit_triton is not None
]


@pytest.fixture(autouse=True)
def _ieee(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: Any = torch.backends.cudnn
    monkeypatch.setattr(settings.conv, "fp32_precision", "ieee")


@pytest.mark.parametrize(("kernel", "sample"), CASES)
def test_results_equal_the_reference(
    kernel: Kernel, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Samples are made, and the reference runs, on the CPU, of bytes as a GPU has them.
    monkeypatch.setattr(int8, "zero_point", lambda device: 0)
    args = sample.args()
    if kernel.name == "pruned_dgrad" and not bool(args[1].isfinite().all()):
        pytest.skip("a zero of the border times an infinite weight is NaN")
    moved = tuple(arg.cuda() if isinstance(arg, Tensor) else arg for arg in args)
    programs = triton_programs(kernel, *moved)
    if isinstance(programs, str):
        pytest.skip(programs)
    for program in programs:
        _check_program(kernel, sample, program, args, moved)


def _check_program(
    kernel: Kernel, sample: Sample, program: Program, args: tuple[Any, ...], moved: tuple[Any, ...]
) -> None:
    module = gpu_build.load(kernel.name, program)
    first, second = (run_program(kernel, module, program, *moved) for _ in range(2))
    results = (first,) if isinstance(first, Tensor) else first
    again = (second,) if isinstance(second, Tensor) else second
    for one, other in zip(results, again, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num()), "two calls differ"
    if kernel.name == "fp8_product":
        # Tensor cores keep 14 bits of the sum of a tile: 2**-13 in units of float32's eps.
        sample = dataclasses.replace(sample, length=sample.length + 2**10)
    _check(kernel, sample, args, tuple(result.cpu() for result in results))


@pytest.mark.parametrize("method", ["int8", "fp8", "pixels", "prune"])
@pytest.mark.parametrize("graphs", [False, True], ids=["launches", "cuda-graphs"])
def test_a_step_uses_the_kernels(method: str, graphs: bool) -> None:
    """And finds a gradient near the exact one; a kernel that fell back would warn."""
    if method == "fp8" and (reason := fp8.unsupported("cuda")) is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1),
        nn.Flatten(), nn.Linear(32 * 16 * 16, 10),
    ).cuda()  # fmt: skip
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(16, 16, 16, 16, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (16,), device="cuda")
    F.cross_entropy(model(x), labels).backward()
    exact = model[0].weight.grad.clone()
    options = {
        "methods": {"2": method},
        "strict": True,
        "inductor": {"triton.cudagraphs": graphs},
    }
    compiled = torch.compile(model, backend=approx, options=options)
    with warnings.catch_warnings():
        # Of torch's, about a graph that it records empty at first.
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
        warnings.filterwarnings("error", message="graphpass:")
        for _ in range(4):
            model.zero_grad(set_to_none=True)
            F.cross_entropy(compiled(x), labels).backward()
    assert graphpass.reports()[-1].approximated
    found = model[0].weight.grad
    assert found.isfinite().all()
    assert F.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.5
