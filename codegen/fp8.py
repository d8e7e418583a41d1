"""Tensors of 8-bit floats: how they are scaled, rounded at random, and kept as bytes.

A format is an element type of torch: m bits of fraction, and exponents from e on. Numbers from 2^e
on are multiples of 2^(exponent - m), smaller ones of 2^(e - m). AMD's gfx942 has formats of its
own, whose exponents are one less, with a single zero. Bytes lie in memory as `codegen.int8` says,
and a zero is the byte 0.

Scales are powers of two: dividing by one is exact, and what is lost, a binade at most, is lost at
the end of the range, where values count least.
"""

import math

import torch
from torch import Tensor

from codegen import int8
from codegen.gpu import target

# Bits of the fraction, and the least exponent. (`torch.finfo` has half of float8_e5m2fnuz's eps.)
SHAPES = {
    torch.float8_e4m3fn: (3, -6), torch.float8_e5m2: (2, -14),
    torch.float8_e4m3fnuz: (3, -7), torch.float8_e5m2fnuz: (2, -15),
}  # fmt: skip
# Of NVIDIA's GPUs, compute capability 8.9 (Ada) is the first that multiplies 8-bit floats.
_FIRST_NVIDIA = 89
_FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
# AMD's first GPUs that multiply them, in formats of their own; later ones have the usual formats.
_OWN_FORMATS = {"e4m3": torch.float8_e4m3fnuz, "e5m2": torch.float8_e5m2fnuz}
_WITH_OWN = ("gfx940", "gfx941", "gfx942")
_WITH_USUAL = ("gfx950", "gfx1200", "gfx1201")
# The least magnitude that a scale is made for keeps the scale's inverse finite.
_LEAST = 2.0**-90
_FRACTION_BITS, _EXPONENT_BIAS = 23, 127


def unsupported(device: str) -> str | None:
    """Return why a type of device multiplies no 8-bit floats; None if it does."""
    if device != "cuda":
        return f"a {device.upper()} multiplies no 8-bit floats"
    name = target.architecture()
    if name.startswith("sm_"):
        if int(name.removeprefix("sm_")) >= _FIRST_NVIDIA:
            return None
        return f"{name} multiplies no 8-bit floats, sm_{_FIRST_NVIDIA} is the first that does"
    return None if name in _WITH_OWN + _WITH_USUAL else f"{name} multiplies no 8-bit floats"


def format_of(name: str, device: str) -> torch.dtype:
    """Return the element type that "e4m3" or "e5m2" is on a type of device."""
    own = device == "cuda" and target.architecture() in _WITH_OWN
    return (_OWN_FORMATS if own else _FORMATS)[name]


def scale_of(largest: Tensor, stored: torch.dtype) -> Tensor:
    """Return the least power of two by which a tensor fits into a format: float32, 0-d.

    Args:
        largest: the tensor's largest magnitude, 0-d. If it is NaN or infinite, so is the scale, and
            what is multiplied with it.
        stored: the format.
    """
    largest = largest.to(torch.float32).clamp_min(_LEAST)
    fraction, exponent = math.frexp(torch.finfo(stored).max)
    # A fraction above that of the format's largest number carries into the exponent.
    carry = (1 << _FRACTION_BITS) - 1 - int((2 * fraction - 1) * (1 << _FRACTION_BITS))
    bits = (largest.view(torch.int32) + carry) >> _FRACTION_BITS
    power = _power_of_two(bits - _EXPONENT_BIAS - exponent + 1)
    return torch.where(largest.isfinite(), power, largest)


def step_of(magnitude: Tensor, stored: torch.dtype) -> Tensor:
    """Return how far numbers of a format are apart at these magnitudes: float32."""
    fraction, least = SHAPES[stored]
    exponent = (magnitude.to(torch.float32).view(torch.int32) >> _FRACTION_BITS) - _EXPONENT_BIAS
    return _power_of_two(exponent.clamp_min(least) - fraction)


def round_at_random(x: Tensor, scale: Tensor, uniform: Tensor, stored: torch.dtype) -> Tensor:
    """Return numbers of a format whose expectation is x / scale: a neighbour, at random.

    With step the distance of neighbours, that is step * floor(|x| / scale / step + uniform). Both
    terms are taken to 16 binary places, as `codegen.int8` does; all else is exact. bfloat16 has no
    more of them, so its expectation is too.

    Args:
        x: float.
        scale: float, 0-d, a power of two; nothing is above the format's largest number then.
        uniform: in (0, 1), of x's shape.
        stored: the format.

    Returns:
        float32, of x's shape. NaN becomes the largest number: who computes the scale from the
        tensor's maximum has NaN there, and in every product with it.
    """
    largest = torch.finfo(stored).max
    number = x.to(torch.float32) * (1.0 / scale.to(torch.float32))
    magnitude = number.abs().nan_to_num(largest, largest).clamp_max(largest)
    step = step_of(magnitude, stored)
    fixed = (magnitude * (65536.0 / step)).round().to(torch.int32)
    whole = (fixed + (uniform * 65536.0).to(torch.int32)) >> 16
    # As integers, because gfx942's formats have no negative zero.
    return torch.where(number < 0, -whole, whole).to(torch.float32) * step


def to_bytes(values: Tensor, before: list[int], after: list[int], stored: torch.dtype) -> Tensor:
    """Return the layout of numbers of a format: [B, C, H, W] -> uint8, flat."""
    return int8.to_bytes(values.to(stored).view(torch.uint8), before, after, zero=0)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return 2 ** exponent, in the range of float32's normal numbers."""
    return ((exponent + _EXPONENT_BIAS) << _FRACTION_BITS).view(torch.float32)
