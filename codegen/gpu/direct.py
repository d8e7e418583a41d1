"""Products of floats that are read where they lie, in Triton.

Nothing is copied but the weights of forward products and input gradients, which are put in the
order of the product anyway: what a `Form` does to them costs no pass of its own.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from codegen import int8
from codegen.gpu import products, weight_gradient
from codegen.gpu import source as gpu


def product_program(
    name: str,
    operand: Tensor,
    weight: Tensor,
    result: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    form: products.Form,
    *,
    forward: bool,
    taken: int | None = None,
    constants: Mapping[str, Any] | None = None,
) -> gpu.Program | str:
    """Return the program for two spatial axes.

    Args:
        name: of the primitive, whose tensors are operand, weight, those of the form's filters.
        operand: the input [B, Ci, IH, IW]; for an input gradient the output gradient.
        weight: [Co, Ci/groups, KH, KW].
        result: what it fills, meta.
        stride: one number a spatial axis.
        padding: one number a spatial axis.
        dilation: one number a spatial axis.
        groups: groups of channels.
        form: which channels are contracted, with what weights.
        forward: whether this is a forward product.
        taken: how many channels of a group are contracted; None for all.
        constants: what the form's text needs to know.
    """
    if (reason := _unsupported(operand, weight)) is not None or taken == 0:
        return reason or "no channel is taken"
    sizes, kernel = list(operand.shape[2:]), list(weight.shape[2:])
    axes = (kernel, stride, padding, dilation)
    border = (
        int8.input_border(sizes, list(result.shape[2:]), *axes)
        if forward
        else int8.grad_border(list(result.shape[2:]), sizes, *axes)
    )
    problem = products.Product(
        result, int(operand.shape[1]), (sizes[0], sizes[1]), [0, 0], weight.stride(), *axes, groups,
        forward, operand.dtype, operand_strides=operand.stride(),
        bordered=not any(map(any, border)), taken=taken,
    )  # fmt: skip
    parts = products.emit(problem, form)
    if isinstance(parts, str):
        return parts
    tensors = ("operand", "weight", *form.filters, "out", *parts.memory)
    run = (
        f"def run({', '.join(tensors)}):",
        "    scales = ()",
        *(f"    {line}" for line in parts.lines),
    )
    about = gpu.about(name, operand=operand, weight=weight)
    given = {**parts.constants, **(constants or {})}
    return gpu.program(
        about, given, parts.text + "\n" + "\n".join(run), tuple(parts.memory.values())
    )


def weight_gradient_program(
    name: str,
    grad: Tensor,
    x: Tensor,
    result: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    form: weight_gradient.Form,
    constants: Mapping[str, Any] | None = None,
) -> gpu.Program | str:
    """Return the program of a weight gradient over all pixels, for two spatial axes.

    Args:
        name: of the primitive, whose tensors are grad, x, those of the form.
        grad: [B, Co, OH, OW].
        x: [B, Ci, IH, IW].
        result: what it fills, meta.
        stride: one number a spatial axis.
        padding: one number a spatial axis.
        dilation: one number a spatial axis.
        groups: groups of channels.
        form: what becomes of the operands.
        constants: what the form's text needs to know.
    """
    if (reason := _unsupported(grad, x)) is not None:
        return reason
    problem = weight_gradient.Problem(
        result, list(grad.shape), list(x.shape), grad.stride(), x.stride(), 0,
        list(result.shape[2:]), stride, padding, dilation, groups, grad.dtype,
    )  # fmt: skip
    parts = weight_gradient.emit(problem, grad.numel() // grad.shape[1], form)
    if isinstance(parts, str):
        return parts
    tensors = ("grad", "x", *form.operands, "out", *parts.memory)
    run = (f"def run({', '.join(tensors)}):", *(f"    {line}" for line in parts.lines))
    about = gpu.about(name, grad=grad, x=x)
    given = {**parts.constants, **(constants or {})}
    return gpu.program(about, given, parts.text + "\n".join(run), tuple(parts.memory.values()))


def _unsupported(first: Tensor, second: Tensor) -> str | None:
    if first.dim() != 4:
        return f"no kernel for {first.dim() - 2} spatial axes"
    if (reason := gpu.unsupported(first, second)) is not None or first.dtype != second.dtype:
        return reason or "operands of two types"
    return "an operand is empty" if 0 in (*first.shape, *second.shape) else None
