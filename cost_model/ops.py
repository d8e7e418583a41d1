"""Cost formulas of the exact products, and the steps that approximate methods compose.

Letters: B batch, M rows, K reduced, N columns, C channels (Ci in, Co out), G groups. A dimension
is an int or a sympy expression, a shape a tuple of dimensions. `itemsize` is the size in bytes of
one element of every operand and result.

FLOPs are those of the dense algorithm, as `torch.utils.flop_counter` defines them: taps that fall
on padding count, adding a bias does not, and causal attention counts in full.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import sympy

from cost_model.cost import Cost, Dim

Shape: TypeAlias = tuple[Dim, ...]

# [B, C, and at least one spatial dimension]
_MIN_CONV_RANK = 3

# Fused attention kernels keep the softmax statistics of every query row in fp32 or wider.
_MIN_STATISTICS_ITEMSIZE = 4


@dataclass(frozen=True, slots=True)
class ConvShape:
    """Shapes of a convolution's tensors; its two gradients have the same ones.

    Attributes:
        x: input, [B, Ci, *spatial].
        w: weight, [Co, Ci/G, *kernel], or [Ci, Co/G, *kernel] if transposed.
        y: output, [B, Co, *out].
        groups: G; 1 is a dense convolution, Ci a depthwise one.
        transposed: whether it is a transposed ("de-") convolution.
    """

    x: Shape
    w: Shape
    y: Shape
    groups: int = 1
    transposed: bool = False

    def __post_init__(self) -> None:
        """Check ranks, signs, and that batch and channels agree where their values are known.

        Raises:
            ValueError: if the shapes cannot belong to one convolution.
        """
        rank = len(self.x)
        if rank < _MIN_CONV_RANK or not rank == len(self.w) == len(self.y):
            raise ValueError(f"need three shapes of one rank >= {_MIN_CONV_RANK}, got {self}")
        if self.groups < 1:
            raise ValueError(f"groups must be >= 1, got {self}")
        if any(sympy.sympify(dim).is_negative for dim in (*self.x, *self.w, *self.y)):
            raise ValueError(f"dimensions must be >= 0, got {self}")

        # A transposed convolution's weight is that of the convolution from y to x.
        outer, inner = (self.x, self.y) if self.transposed else (self.y, self.x)
        agreements = {
            "batch of x and y": (self.x[0], self.y[0]),
            "channels and w[0]": (outer[1], self.w[0]),
            "channels and groups * w[1]": (inner[1], self.groups * self.w[1]),
            "w[0] and a multiple of groups": (sympy.Mod(self.w[0], self.groups), 0),
        }
        for what, (left, right) in agreements.items():
            if sympy.sympify(left - right).is_zero is False:
                raise ValueError(f"{what} disagree in {self}")

    @property
    def flops(self) -> Dim:
        """FLOPs of the convolution, and of either gradient: all three sum the same products."""
        batch, _, *positions = self.x if self.transposed else self.y
        # every weight meets, in every sample, every position of x (transposed) or of y
        return 2 * batch * element_count(tuple(positions)) * element_count(self.w)


def convolution(shape: ConvShape, itemsize: int, *, bias_elements: Dim = 0) -> Cost:
    """Return the cost of y = conv(x, w), transposed or not.

    Args:
        shape: the tensors' shapes.
        itemsize: bytes per element.
        bias_elements: Co if a bias is added, else 0.
    """
    return Cost(
        flops=shape.flops,
        bytes_read=(
            element_count(shape.x) * itemsize  # x
            + element_count(shape.w) * itemsize  # w
            + bias_elements * itemsize  # the bias
        ),
        bytes_written=element_count(shape.y) * itemsize,  # y
    )


def convolution_input_grad(shape: ConvShape, itemsize: int) -> Cost:
    """Return the cost of dx, [B, Ci, *spatial], from the output gradient and the weight."""
    return Cost(
        flops=shape.flops,
        bytes_read=(
            element_count(shape.y) * itemsize  # the output gradient
            + element_count(shape.w) * itemsize  # w
        ),
        bytes_written=element_count(shape.x) * itemsize,  # dx
    )


def convolution_weight_grad(shape: ConvShape, itemsize: int) -> Cost:
    """Return the cost of dw, w's shape, from the output gradient and the input.

    The bias gradient is not part of it: that is `reduce` of the output gradient to Co sums.
    """
    return Cost(
        flops=shape.flops,
        bytes_read=(
            element_count(shape.y) * itemsize  # the output gradient
            + element_count(shape.x) * itemsize  # x
        ),
        bytes_written=element_count(shape.w) * itemsize,  # dw
    )


def matmul(batch: Dim, m: Dim, k: Dim, n: Dim, itemsize: int, *, bias_elements: Dim = 0) -> Cost:
    """Return the cost of [B, M, K] @ [B, K, N] (+ an addend): mm, addmm, bmm and baddbmm.

    Args:
        batch: B, 1 for mm and addmm.
        m: M.
        k: K.
        n: N.
        itemsize: bytes per element.
        bias_elements: elements of the addend as stored, before it is broadcast; 0 without one.
    """
    return Cost(
        flops=2 * batch * m * k * n,
        bytes_read=(
            batch * m * k * itemsize  # the left matrices
            + batch * k * n * itemsize  # the right matrices
            + bias_elements * itemsize  # the addend
        ),
        bytes_written=batch * m * n * itemsize,  # the products
    )


def attention(
    batch_heads: Dim,
    q_len: Dim,
    kv_len: Dim,
    head_dim: Dim,
    v_dim: Dim,
    *,
    itemsize: int,
    kv_batch_heads: Dim | None = None,
    bias_elements: Dim = 0,
) -> Cost:
    """Return the cost of fused softmax(q @ k^T + bias) @ v, which never stores the scores.

    Args:
        batch_heads: B * heads of q: [B*heads, q_len, head_dim].
        q_len: query positions.
        kv_len: key and value positions.
        head_dim: columns of q and k.
        v_dim: columns of v and of the result.
        itemsize: bytes per element.
        kv_batch_heads: B * heads of k and v if heads of q share them; None: as many as q has.
        bias_elements: elements of the bias or mask as stored, before it is broadcast.
    """
    kv_rows = (batch_heads if kv_batch_heads is None else kv_batch_heads) * kv_len
    q_rows = batch_heads * q_len
    return Cost(
        flops=(
            2 * q_rows * kv_len * head_dim  # scores, q @ k^T
            + 2 * q_rows * kv_len * v_dim  # probabilities @ v
        ),
        bytes_read=(
            q_rows * head_dim * itemsize  # q
            + kv_rows * head_dim * itemsize  # k
            + kv_rows * v_dim * itemsize  # v
            + bias_elements * itemsize  # the bias or mask
        ),
        bytes_written=(
            q_rows * v_dim * itemsize  # the result
            + _softmax_statistics_bytes(q_rows, itemsize)  # kept for the backward pass
        ),
    )


def attention_backward(
    batch_heads: Dim,
    q_len: Dim,
    kv_len: Dim,
    head_dim: Dim,
    v_dim: Dim,
    *,
    itemsize: int,
    kv_batch_heads: Dim | None = None,
    bias_elements: Dim = 0,
) -> Cost:
    """Return the cost of the gradients of q, k and v in fused attention, scores recomputed.

    The gradient of a bias is not part of it. Arguments are those of `attention`.
    """
    kv_rows = (batch_heads if kv_batch_heads is None else kv_batch_heads) * kv_len
    q_rows = batch_heads * q_len
    return Cost(
        flops=(
            2 * q_rows * kv_len * head_dim  # scores again, q @ k^T
            + 2 * q_rows * kv_len * v_dim  # gradient of the probabilities, dout @ v^T
            + 2 * q_rows * kv_len * v_dim  # dv, probabilities^T @ dout
            + 2 * q_rows * kv_len * head_dim  # dq, dscores @ k
            + 2 * q_rows * kv_len * head_dim  # dk, dscores^T @ q
        ),
        bytes_read=(
            2 * q_rows * v_dim * itemsize  # the result and its gradient
            + q_rows * head_dim * itemsize  # q
            + kv_rows * head_dim * itemsize  # k
            + kv_rows * v_dim * itemsize  # v
            + bias_elements * itemsize  # the bias or mask
            + _softmax_statistics_bytes(q_rows, itemsize)  # kept by the forward pass
        ),
        bytes_written=(
            q_rows * head_dim * itemsize  # dq
            + kv_rows * head_dim * itemsize  # dk
            + kv_rows * v_dim * itemsize  # dv
        ),
    )


def elementwise(
    elements: Dim, reads: int, writes: int, itemsize: int, flops_per_element: int = 1
) -> Cost:
    """Return the cost of one fused pointwise pass over tensors of `elements` elements.

    Args:
        elements: elements of each tensor.
        reads: tensors read.
        writes: tensors written.
        itemsize: bytes per element.
        flops_per_element: operations on each element; 0 for a copy.
    """
    return Cost(
        flops=elements * flops_per_element,
        bytes_read=elements * reads * itemsize,  # every operand
        bytes_written=elements * writes * itemsize,  # every result
    )


def reduce(elements: Dim, outputs: Dim, itemsize: int) -> Cost:
    """Return the cost of reducing `elements` values to `outputs` values, one FLOP per element."""
    return Cost(
        flops=elements,
        bytes_read=elements * itemsize,  # the values
        bytes_written=outputs * itemsize,  # the sums, or other reductions
    )


def gather(rows: Dim, row_elements: Dim, itemsize: int, index_itemsize: int = 8) -> Cost:
    """Return the cost of copying `rows` selected rows into a dense tensor.

    Args:
        rows: rows selected.
        row_elements: elements in each row.
        itemsize: bytes per element.
        index_itemsize: bytes per index, 8 for int64.
    """
    return Cost(
        flops=0,
        bytes_read=(
            rows * row_elements * itemsize  # the selected rows, not the others
            + rows * index_itemsize  # their indices
        ),
        bytes_written=rows * row_elements * itemsize,  # the dense copy
    )


def fill(elements: Dim, itemsize: int) -> Cost:
    """Return the cost of writing a constant to `elements` elements."""
    return Cost(
        flops=0,
        bytes_read=0,  # the constant is a register
        bytes_written=elements * itemsize,  # the tensor
    )


def element_count(shape: Shape) -> Dim:
    """Return the number of elements of a tensor, 1 for the empty shape."""
    return math.prod(shape)


def _softmax_statistics_bytes(rows: Dim, itemsize: int) -> Dim:
    """Return the bytes of one log-sum-exp per query row."""
    return rows * max(itemsize, _MIN_STATISTICS_ITEMSIZE)
