"""One product of a joint graph: its operands, and how to compute it in another way beside it."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from graphpass import joint_graph
from graphpass.errors import RewriteError
from graphpass.joint_graph import aten
from graphpass.method import Method, salt_of
from graphpass.site import FACTORS, Gradient, Site
from graphpass.splice import size_nodes, splice
from graphpass.state import State, with_state

# By the names that methods have for them.
Operands = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Replacement:
    """One site and what computes it instead."""

    site: Site
    method: Method
    params: Any


@dataclass(frozen=True, slots=True)
class KeptNodes:
    """The inputs of a graph that hold the state of one site.

    Attributes:
        step: int64 0-d node.
        slots: the tensors by the names of their slots.
    """

    step: Node
    slots: Mapping[str, Node]


def exact_part(graph: Graph, anchor: Node, like: Node, operands: Operands) -> Node:
    """Return one result of `convolution_backward`, computed without the others.

    Args:
        graph: a joint graph.
        anchor: node that it is put before.
        like: the result in the graph, whose place it takes or which it stands beside.
        operands: what it is computed from.

    The input gradient needs only the shape of the input. Passing the input itself would keep it
    alive until backward, and what an approximated weight gradient saves would be lost; so memory
    that is allocated in backward and never touched stands in for it. (A single element expanded to
    the shape would cost a copy: the vendor's kernel first makes its input contiguous.)
    """
    node, index = like.args
    assert isinstance(node, Node)
    bias_sizes, geometry = node.args[3], node.args[4:10]
    grad, x, weight = (operands[name] for name in ("grad", "input", "weight"))

    def input_grad(grad: Tensor, weight: Tensor, *sizes: int) -> Tensor:
        x = torch.empty_permuted(sizes, layout, dtype=grad.dtype, device=grad.device)
        mask = [True, False, False]
        result: Tensor = aten.convolution_backward.default(grad, x, weight, None, *geometry, mask)[
            0
        ]
        return result

    def weight_grad(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        mask = [False, True, False]
        result: Tensor = aten.convolution_backward.default(
            grad, x, weight, bias_sizes, *geometry, mask
        )[1]
        return result

    def bias_grad(grad: Tensor) -> Tensor:
        return grad.sum([0, *range(2, grad.dim())])

    layout = _layout(joint_graph.value_of(like))
    if index == 0:
        sizes = size_nodes(graph, anchor, x)
        inputs = (grad, weight, *sizes)
        return splice(graph, anchor, _laid_out(input_grad, layout), inputs, like)
    if index == 1:
        return splice(graph, anchor, _laid_out(weight_grad, layout), (grad, x, weight), like)
    return splice(graph, anchor, bias_grad, (grad,), like)


def approximate(
    graph: Graph,
    anchor: Node,
    replacement: Replacement,
    operands: Operands,
    seed: Node,
    like: Node,
    addend: "Addend | None" = None,
    kept: KeptNodes | None = None,
) -> Node:
    """Return the approximate product.

    Args:
        graph: a joint graph.
        anchor: node that it is put before.
        replacement: what computes it.
        operands: what it is computed from.
        seed: int64 0-d node that the draws are hashed from.
        like: the exact product in the graph.
        addend: what is added to the product.
        kept: the state of the site, if the method keeps any.
    """
    site, method, params = replacement.site, replacement.method, replacement.params
    value = joint_graph.value_of(like)
    dtype, device = value.dtype, value.device
    sizes = result_sizes(graph, anchor, site, operands)
    rank, salt = len(sizes), salt_of(site)

    named = named_operands(graph, replacement, operands)
    slots = {} if kept is None else dict(kept.slots)
    end = rank + len(named)

    def lowered(seed: Tensor, *args: Any) -> Tensor:
        template = torch.empty((), dtype=dtype, device=device).expand(args[:rank])
        values = args[rank:end]
        state = None
        if slots:
            step, *tensors = args[end:]
            after = values[0] if values else step
            state = State(step, dict(zip(slots, tensors, strict=True)), after)
        lower = with_state(method.lower, state)
        result = lower(site, params, template, seed, salt, *values)
        if result.shape != template.shape or result.dtype != dtype:
            raise RewriteError(
                f"the method returned {result.dtype} {list(result.shape)} instead of {dtype} "
                f"{list(template.shape)}"
            )
        return result

    def completed(seed: Tensor, extra: Tensor, *args: Any) -> Tensor:
        assert addend is not None
        return addend.add(lowered(seed, *args), extra)

    args = (*sizes, *named, *([] if kept is None else [kept.step, *slots.values()]))
    layout = _layout(value)
    if addend is not None:
        inputs = (seed, addend.node, *args)
        return splice(graph, anchor, _laid_out(completed, layout), inputs, like)
    return splice(graph, anchor, _laid_out(lowered, layout), (seed, *args), like)


def named_operands(graph: Graph, replacement: Replacement, operands: Operands) -> list[Any]:
    """Return the operands that a method asks for.

    Args:
        graph: a joint graph.
        replacement: the method, and the site.
        operands: those of the product itself; `FACTORS` are looked up by their names.

    Raises:
        RewriteError: if the graph has no node of such a name.
    """
    site, found = replacement.site, dict(operands)
    names = replacement.method.operands(site, replacement.params)
    if set(names) & set(FACTORS):
        # Nodes keep their names where what computes them is replaced.
        nodes = {node.name: node for node in graph.nodes if node.name in site.factors}
        if set(nodes) != set(site.factors):
            raise RewriteError(f"the graph lacks a factor of the forward product of {site.id}")
        found |= {name: nodes[of] for name, of in zip(FACTORS, site.factors, strict=True)}
    return [found[name] for name in names]


def result_sizes(graph: Graph, anchor: Node, site: Site, operands: Operands) -> list[Node | int]:
    """Return the sizes of a site's product."""
    if site.conv is not None:
        if site.gradient is Gradient.FORWARD:
            return _forward_sizes(graph, anchor, operands)
        return size_nodes(graph, anchor, operands["input" if site.result == 0 else "weight"])
    left = size_nodes(graph, anchor, operands["left"])
    right = size_nodes(graph, anchor, operands["right"])
    return [*left[:-1], right[-1]]


def _forward_sizes(graph: Graph, node: Node, operands: Operands) -> list[Node | int]:
    """Return the sizes of a convolution's result, before there is one."""
    stride, padding, dilation, transposed, beyond, _ = cast("Any", node.args[3:9])
    known, inputs = joint_graph.value_of(node).shape, size_nodes(graph, node, operands["input"])
    kernel = joint_graph.value_of(operands["weight"]).shape[2:]

    def of(axis: int) -> Node | int:
        if isinstance(known[axis], int) or axis == 0:
            return inputs[0] if axis == 0 else known[axis]
        i = axis - 2
        reach, size = dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i], inputs[axis]
        if transposed:
            steps = computed(operator.mul, computed(operator.sub, size, 1), stride[i])
            return computed(operator.add, steps, reach + beyond[i])
        steps = computed(operator.floordiv, computed(operator.sub, size, reach), stride[i])
        return computed(operator.add, steps, 1)

    def computed(function: Callable[[Any, Any], Any], one: Node | int, other: int) -> Node:
        with graph.inserting_before(node):
            new = graph.call_function(function, (one, other))
        value = function(one.meta["val"] if isinstance(one, Node) else one, other)
        new.meta = {"val": value, "partitioner_tag": node.meta.get("partitioner_tag")}
        return new

    return [of(axis) for axis in range(len(known))]


@dataclass(frozen=True, slots=True)
class Addend:
    """What a product is added to: the bias of a layer."""

    node: Node
    add: Callable[[Tensor, Tensor], Tensor]


def operands_of(node: Node) -> tuple[Operands, Addend | None]:
    """Return the operands of a product by their names in `Method`, and what is added to it."""
    if node.target is aten.convolution_backward.default:
        return dict(zip(("grad", "input", "weight"), node.args[:3], strict=True)), None
    if node.target is aten.convolution.default:
        x, weight, bias = node.args[:3]
        operands = {"input": x, "weight": weight}
        if bias is None:
            return operands, None
        assert isinstance(bias, Node)
        axes = [-1] + [1] * (joint_graph.value_of(node).dim() - 2)
        return operands, Addend(bias, lambda product, extra: product + extra.view(axes))
    if node.target not in {aten.addmm.default, aten.baddbmm.default}:
        return {"left": node.args[0], "right": node.args[1]}, None
    extra, left, right = node.args[:3]
    assert isinstance(extra, Node)
    alpha: Any = node.kwargs.get("alpha", 1)
    beta: Any = node.kwargs.get("beta", 1)

    def add(product: Tensor, extra: Tensor) -> Tensor:
        result: Tensor = product * alpha + extra * beta
        return result

    addend = Addend(extra, add)
    return {"left": left, "right": right}, addend


def _layout(value: Tensor) -> tuple[int, ...]:
    """Return the axes from the one with the largest stride to the one with the smallest."""

    def hint(axis: int) -> int:
        stride = value.stride(axis)
        return stride if isinstance(stride, int) else int(stride.node.hint)

    return tuple(sorted(range(value.dim()), key=lambda axis: (-hint(axis), axis)))


def _laid_out(function: Callable[..., Tensor], layout: tuple[int, ...]) -> Callable[..., Tensor]:
    """Return `function` with its result copied into the given layout where it has another."""

    def laid_out(*args: Any) -> Tensor:
        result = function(*args)
        wanted = torch.empty_permuted(
            result.shape, layout, dtype=result.dtype, device=result.device
        )
        if _strides(result) == _strides(wanted):
            return result
        return wanted.copy_(result)

    return laid_out


def _strides(value: Tensor) -> tuple[Any, ...]:
    sizes = joint_graph.dims_of(value.shape)
    strides = joint_graph.dims_of(value.stride())
    return tuple(0 if size == 1 else step for size, step in zip(sizes, strides, strict=True))
