"""Values of large magnitude, for kernels that leave out the others: top-K by a threshold.

Of values below the threshold nothing is left but what is not finite: they are multiplied by 0, and
NaN stays NaN. A threshold that is NaN is above all values.
"""

from torch import Tensor


def large(x: Tensor, threshold: Tensor) -> Tensor:
    """Return x with 0 for the values whose magnitude is below the threshold, 0-d."""
    return x * (x.abs() >= threshold).to(x.dtype)


# The same of a value that was read, and of the pointer to the threshold.
TRITON = """
@triton.jit
def large(value, threshold):
    # Both types are exact in float32.
    kept = tl.abs(value).to(tl.float32) >= tl.load(threshold).to(tl.float32)
    return tl.where(kept, value, value * 0.0)

"""
