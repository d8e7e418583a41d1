"""Random numbers as pure functions of a seed tensor, for use inside a compiled graph.

A random operation in a joint graph may be executed twice, once forward and once backward, with
different results. These draws hash (seed, salt, position) instead: the same inputs give the same
numbers wherever the compiler puts the computation, torch's own generators are left alone, and a
run can be resumed bit for bit.
"""

import torch
from torch import Tensor

# All constants and intermediate values stay below 2**62, so int64 arithmetic never overflows; the
# constants stay below 2**31 because Inductor folds larger ones into a form it cannot index with.
_MASK = 0x7FFFFFFF
_MULTIPLIER = 0x45D9F3B
_FINAL_MULTIPLIER = 0x2C1B3C6D
_GOLDEN = 0x1E3779B1
# One bit less than a float32 holds: half a step above the largest multiple is then still exact,
# where it would be rounded up to 1 otherwise.
_RESOLUTION = 1 << 23


def uniform(seed: Tensor, count: int, salt: int) -> Tensor:
    """Return `count` numbers, uniform in the open interval (0, 1).

    They are the 2**23 odd multiples of 2**-24, so neither 0 nor 1 is ever among them.

    Args:
        seed: int64, 0-d, in [0, 2**31).
        count: how many; may be symbolic under tracing.
        salt: tells apart the draws that share a seed.

    Returns:
        float32 [count].
    """
    bits = _hash(seed, count, salt) & (_RESOLUTION - 1)
    return (bits.to(torch.float32) + 0.5) * (1.0 / _RESOLUTION)


def coarse(seed: Tensor, count: int, salt: int) -> Tensor:
    """Return `count` numbers, uniform among the odd multiples of 2**-16: half the work of others.

    One hash gives two of them, at positions 32 i + j and 32 i + 16 + j for j < 16: a vector of 16
    hashes gives two vectors of draws.

    Args:
        seed: int64, 0-d, in [0, 2**31).
        count: how many; may be symbolic under tracing.
        salt: tells apart the draws that share a seed.

    Returns:
        float32 [count].
    """
    bits = _hash(seed, -(-count // 32) * 16, salt).view(-1, 16)
    # 15 bits of each half; the bit between them is left out.
    halves = torch.stack([bits & 0x7FFF, bits >> 16], dim=1).flatten()[:count]
    return (halves.to(torch.float32) + 0.5) * (1.0 / 0x8000)


def normal(seed: Tensor, count: int, salt: int) -> Tensor:
    """Return `count` standard normal numbers (Box-Muller transform): float32 [count].

    Args:
        seed: int64, 0-d, in [0, 2**31).
        count: how many; may be symbolic under tracing.
        salt: tells apart the draws that share a seed.
    """
    radius = torch.sqrt(-2.0 * torch.log(uniform(seed, count, 2 * salt)))
    return radius * torch.cos((2.0 * torch.pi) * uniform(seed, count, 2 * salt + 1))


def mix(*words: int) -> int:
    """Return one integer in [0, 2**31) from several; runs on the host."""
    state = 0
    for word in words:
        state = (state * 0x19660D + (word & _MASK) + 0x3C6EF35F) & _MASK
        state = ((state ^ (state >> 16)) * _MULTIPLIER) & _MASK
        state = ((state ^ (state >> 15)) * _FINAL_MULTIPLIER) & _MASK
        state ^= state >> 16
    return state


def _hash(seed: Tensor, count: int, salt: int) -> Tensor:
    """Return 31 bits for each position: int64 [count]."""
    key = _mix((seed ^ ((salt * _GOLDEN + 0x7F4A7C1) & _MASK)) & _MASK)
    bits = _mix((torch.arange(count, device=seed.device) ^ key) & _MASK)
    bits = ((bits ^ (bits >> 15)) * _FINAL_MULTIPLIER) & _MASK
    return bits ^ (bits >> 16)


def _mix(bits: Tensor) -> Tensor:
    for _ in range(2):
        bits = ((bits ^ (bits >> 16)) * _MULTIPLIER) & _MASK
    return bits
