"""8-bit floats: scales, rounding at random, bytes, and which devices multiply them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from codegen import draws, fp8, int8
from codegen.gpu import target
from codegen.kernel import kernels

FORMATS = tuple(fp8.SHAPES)
by_format = pytest.mark.parametrize("stored", FORMATS, ids=str)
# Every value that a draw can have: the odd multiples of 2^-16.
DRAWS = (torch.arange(1 << 15) * 2 + 1) / (1 << 16)


def _numbers(stored: torch.dtype) -> Tensor:
    """Return all finite numbers of a format that are not negative, in order: float32."""
    values = torch.arange(256, dtype=torch.uint8).view(stored).to(torch.float32)
    return values[values.isfinite() & (values >= 0)].unique()


def _expected(x: Tensor, stored: torch.dtype) -> Tensor:
    """Return the mean over all draws of each value's rounding, in float64."""
    one = torch.tensor(1.0)
    means = [
        fp8.round_at_random(value.expand(DRAWS.shape), one, DRAWS, stored).double().mean()
        for value in x
    ]
    return torch.stack(means)


@by_format
def test_a_step_is_the_distance_to_the_next_number(stored: torch.dtype) -> None:
    numbers = _numbers(stored)
    assert torch.equal(fp8.step_of(numbers[:-1], stored), numbers[1:] - numbers[:-1])


@by_format
def test_numbers_of_the_format_stay_what_they_are(stored: torch.dtype) -> None:
    numbers = torch.cat([-_numbers(stored), _numbers(stored)])
    for draw in (DRAWS[0], DRAWS[-1]):
        uniform = draw.expand(numbers.shape)
        rounded = fp8.round_at_random(numbers, torch.tensor(1.0), uniform, stored)
        assert torch.equal(rounded, numbers)
        # No zero is negative: in two of the formats that would be NaN.
        assert not rounded[rounded == 0].signbit().any()


@by_format
def test_the_expectation_over_all_draws_is_the_value(stored: torch.dtype) -> None:
    """Exactly, of bfloat16's 8 significant bits: from the subnormal numbers to the largest one."""
    numbers = _numbers(stored)
    generator = torch.Generator().manual_seed(0)
    low, high = numbers[:-1], numbers[1:]
    between = low + (high - low) * torch.randint(1, 16, low.shape, generator=generator) / 16
    sign = torch.randint(0, 2, low.shape, generator=generator) * 2 - 1
    values = between * sign
    assert torch.equal(values.bfloat16().float(), values)
    assert torch.equal(_expected(values, stored), values.double())


@by_format
def test_the_expectation_of_float32_is_off_by_a_fraction_of_a_step(stored: torch.dtype) -> None:
    """To the nearest 2^-16 first, and every other multiple of that is drawn once too often."""
    values = torch.randn(50, generator=torch.Generator().manual_seed(1))
    missed = (_expected(values, stored) - values.double()).abs()
    assert (missed <= fp8.step_of(values.abs(), stored) * 1.5 * 2.0**-16).all()


@by_format
@pytest.mark.parametrize("exponent", [-80, -3, 0, 5, 118])
def test_the_scale_is_the_least_power_of_two_that_fits(stored: torch.dtype, exponent: int) -> None:
    most = torch.finfo(stored).max
    power = 2.0**exponent
    for largest, wanted in (
        (torch.tensor(most), 1.0), (torch.tensor(most).nextafter(torch.tensor(torch.inf)), 2.0),
        (torch.tensor(most / 2), 0.5), (torch.tensor(most * 0.75), 1.0),
    ):  # fmt: skip
        if (largest * power).isfinite():
            assert fp8.scale_of(largest * power, stored) == wanted * power


@by_format
def test_scales_of_nothing_and_of_what_is_not_finite(stored: torch.dtype) -> None:
    least = fp8.scale_of(torch.tensor(0.0), stored)
    assert 0 < least and (1 / least).isfinite()
    assert fp8.scale_of(torch.tensor(torch.finfo(torch.float32).max), stored).isfinite()
    assert fp8.scale_of(torch.tensor(torch.inf), stored) == torch.inf
    assert fp8.scale_of(torch.tensor(torch.nan), stored).isnan()


@by_format
def test_nothing_is_rounded_beyond_the_largest_number(stored: torch.dtype) -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(2))
    scale = fp8.scale_of(x.abs().amax(), stored)
    rounded = fp8.round_at_random(x, scale, DRAWS[-1].expand(x.shape), stored)
    most = torch.finfo(stored).max
    assert (x / scale).abs().max() <= most and rounded.abs().max() <= most
    assert torch.equal(rounded.to(stored).float(), rounded)


@by_format
def test_bytes_are_those_of_the_format(stored: torch.dtype) -> None:
    """Of the kernel's reference, which Triton's sums of exponent and fraction are compared with."""
    kernel = kernels()["fp8_round"]
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(3))
    scale, seed = fp8.scale_of(x.abs().amax(), stored), torch.tensor(99)
    result: Any = kernel.reference(x, scale, seed, 7, [1, 0], [0, 2], stored)
    values = int8.from_bytes(result, [2, 5, 3, 4], [1, 0], [0, 2], torch.float32, stored)
    uniform = draws.coarse(seed, x.numel(), 7).view(2, 3, 4, 5).permute(0, 3, 1, 2)
    assert torch.equal(values, fp8.round_at_random(x, scale, uniform, stored))
    assert not result[-int8.SLACK :].any()


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("sm_80", "sm_80 multiplies no 8-bit floats, sm_89 is the first that does"),
        ("sm_86", "sm_86 multiplies no 8-bit floats, sm_89 is the first that does"),
        ("sm_89", None), ("sm_90", None), ("sm_120", None),
        ("gfx90a", "gfx90a multiplies no 8-bit floats"), ("gfx942", None), ("gfx950", None),
    ],
)  # fmt: skip
def test_a_gpu_has_them_or_a_reason(
    architecture: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "architecture", lambda: architecture)
    assert fp8.unsupported("cuda") == reason
    kernel = kernels()["fp8_product"]
    assert kernel.emit_triton is not None
    program = kernel.emit_triton(*kernel.samples()[0].args())
    assert (program == reason) is (reason is not None)
    own = architecture == "gfx942"
    assert fp8.format_of("e4m3", "cuda") is (torch.float8_e4m3fnuz if own else torch.float8_e4m3fn)
    assert fp8.format_of("e5m2", "cuda") is (torch.float8_e5m2fnuz if own else torch.float8_e5m2)


def test_a_cpu_has_a_reason() -> None:
    assert fp8.unsupported("cpu") == "a CPU multiplies no 8-bit floats"
    assert fp8.format_of("e4m3", "cpu") is torch.float8_e4m3fn


@pytest.mark.parametrize(("hip", "name"), [(None, "sm_89"), ("6.4", "gfx942")], ids=["cuda", "hip"])
def test_the_architecture_is_that_of_the_current_gpu(
    hip: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.architecture.cache_clear()
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    try:
        assert target.architecture() == name
    finally:
        target.architecture.cache_clear()
