"""Replace planned sites of a joint graph by their approximations.

The graph that is rewritten is always a private copy: every compiled variant is traced anew from
the user's graph, so that a failure here leaves the exact graph untouched.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from graphpass import joint_graph, verify
from graphpass.errors import RewriteError
from graphpass.joint_graph import aten
from graphpass.masks import settle_masks
from graphpass.method import Method, salt_of
from graphpass.site import Gradient, Site
from graphpass.splice import size_nodes, splice


@dataclass(frozen=True, slots=True)
class Replacement:
    """One site and what computes it instead."""

    site: Site
    method: Method
    params: Any


def rewrite(graph: Graph, replacements: Sequence[Replacement], seed: Node) -> None:
    """Rewrite each planned site exactly once, then check the graph.

    Args:
        graph: a joint graph, changed in place.
        replacements: the planned sites.
        seed: int64 0-d placeholder that the draws are hashed from.

    Raises:
        RewriteError: if a site is not found, or the rewritten graph is not what was planned; the
            message names site and method.
    """
    before = verify.interface(graph)
    nodes = {node.name: node for node in graph.nodes}
    fired = 0
    for name, group in _by_node(replacements).items():
        if name not in nodes:
            raise RewriteError(f"the graph has no node {name!r} for {group[0].site.id}")
        try:
            fired += _rewrite_node(graph, nodes[name], group, seed)
        except Exception as error:
            what = ", ".join(f"{r.site.id} by {r.method.name} {r.params}" for r in group)
            raise RewriteError(
                f"could not rewrite {what} at {nodes[name].format_node()}: "
                f"{type(error).__name__}: {error}"
            ) from error
    settle_masks(graph)
    verify.check(graph, before, planned=len(replacements), fired=fired)


def seed_placeholder(graph: Graph) -> Node:
    """Return the placeholder of the seed: the last input that is not a tangent."""
    inputs = [
        node for node in graph.find_nodes(op="placeholder") if "tangents" not in str(node.target)
    ]
    seed: Node = inputs[-1]
    value = joint_graph.value_of(seed)
    assert value.dtype == torch.int64 and value.dim() == 0, seed.format_node()
    return seed


def _by_node(replacements: Sequence[Replacement]) -> dict[str, list[Replacement]]:
    groups: dict[str, list[Replacement]] = {}
    for replacement in replacements:
        groups.setdefault(replacement.site.node, []).append(replacement)
    return groups


def _rewrite_node(graph: Graph, node: Node, group: list[Replacement], seed: Node) -> int:
    if node.target is aten.convolution_backward.default:
        return _rewrite_convolution(graph, node, group, seed)
    (replacement,) = group
    operands, addend = _operands_of(node)
    new = _approximate(graph, node, replacement, operands, seed, like=node, addend=addend)
    _replace(graph, node, new)
    return 1


def _rewrite_convolution(graph: Graph, node: Node, group: list[Replacement], seed: Node) -> int:
    """Take a `convolution_backward` apart and approximate the planned products of it."""
    grad, x, weight = node.args[:3]
    operands = {"grad": grad, "input": x, "weight": weight}
    planned = {replacement.site.result: replacement for replacement in group}
    fired = 0
    for user in list(node.users):
        index = user.args[1]
        replacement = planned.get(index)  # type: ignore[arg-type]
        if replacement is not None:
            new = _approximate(graph, node, replacement, operands, seed, like=user)
            fired += 1
        else:
            new = _exact_part(graph, node, int(index))  # type: ignore[arg-type]
        _replace(graph, user, new)
    graph.erase_node(node)
    return fired


def _exact_part(graph: Graph, node: Node, index: int) -> Node:
    """Return one result of `convolution_backward`, computed without the others.

    The input gradient needs only the shape of the input. Passing the input itself would keep it
    alive until backward, and what an approximated weight gradient saves would be lost; so memory
    that is allocated in backward and never touched stands in for it. (A single element expanded to
    the shape would cost a copy: the vendor's kernel first makes its input contiguous.)
    """
    grad, x, weight, bias_sizes = node.args[:4]
    geometry = node.args[4:10]
    assert isinstance(grad, Node) and isinstance(x, Node) and isinstance(weight, Node)

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

    like = next(user for user in node.users if user.args[1] == index)
    layout = _layout(joint_graph.value_of(like))
    if index == 0:
        sizes = size_nodes(graph, node, x)
        return splice(graph, node, _laid_out(input_grad, layout), (grad, weight, *sizes))
    if index == 1:
        return splice(graph, node, _laid_out(weight_grad, layout), (grad, x, weight))
    return splice(graph, node, bias_grad, (grad,))


def _approximate(
    graph: Graph,
    anchor: Node,
    replacement: Replacement,
    operands: dict[str, Any],
    seed: Node,
    like: Node,
    addend: "_Addend | None" = None,
) -> Node:
    site, method, params = replacement.site, replacement.method, replacement.params
    value = joint_graph.value_of(like)
    dtype, device = value.dtype, value.device
    sizes = _result_sizes(graph, anchor, site, operands)
    rank, salt = len(sizes), salt_of(site)

    def lowered(seed: Tensor, *args: Any) -> Tensor:
        template = torch.empty((), dtype=dtype, device=device).expand(args[:rank])
        result: Tensor = method.lower(site, params, template, seed, salt, *args[rank:])
        if result.shape != template.shape or result.dtype != dtype:
            raise RewriteError(
                f"the method returned {result.dtype} {list(result.shape)} instead of {dtype} "
                f"{list(template.shape)}"
            )
        return result

    def completed(seed: Tensor, extra: Tensor, *args: Any) -> Tensor:
        assert addend is not None
        return addend.add(lowered(seed, *args), extra)

    names = method.operands(site, params)
    args = (*sizes, *(operands[name] for name in names))
    if addend is not None:
        return splice(
            graph, anchor, _laid_out(completed, _layout(value)), (seed, addend.node, *args)
        )
    args = (seed, *args)
    return splice(graph, anchor, _laid_out(lowered, _layout(value)), args)


def _result_sizes(
    graph: Graph, anchor: Node, site: Site, operands: dict[str, Any]
) -> list[Node | int]:
    if site.conv is not None:
        if site.gradient is Gradient.FORWARD:
            return size_nodes(graph, anchor, anchor)
        return size_nodes(graph, anchor, operands["input" if site.result == 0 else "weight"])
    left = size_nodes(graph, anchor, operands["left"])
    right = size_nodes(graph, anchor, operands["right"])
    return [*left[:-1], right[-1]]


@dataclass(frozen=True, slots=True)
class _Addend:
    """What a product is added to: the bias of a layer."""

    node: Node
    add: Callable[[Tensor, Tensor], Tensor]


def _operands_of(node: Node) -> tuple[dict[str, Any], _Addend | None]:
    """Return the factors of a forward convolution or a matrix product, and what is added to it."""
    if node.target is aten.convolution.default:
        x, weight, bias = node.args[:3]
        operands = {"input": x, "weight": weight}
        if bias is None:
            return operands, None
        assert isinstance(bias, Node)
        axes = [-1] + [1] * (joint_graph.value_of(node).dim() - 2)
        return operands, _Addend(bias, lambda product, extra: product + extra.view(axes))
    if node.target not in {aten.addmm.default, aten.baddbmm.default}:
        return {"left": node.args[0], "right": node.args[1]}, None
    extra, left, right = node.args[:3]
    assert isinstance(extra, Node)
    alpha: Any = node.kwargs.get("alpha", 1)
    beta: Any = node.kwargs.get("beta", 1)

    def add(product: Tensor, extra: Tensor) -> Tensor:
        result: Tensor = product * alpha + extra * beta
        return result

    addend = _Addend(extra, add)
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


def _replace(graph: Graph, old: Node, new: Node) -> None:
    """Let `new` take the place and the name of `old`."""
    old.replace_all_uses_with(new)
    name = old.name
    graph.erase_node(old)
    # Consumers identify results by name; the name is free again, as its node is gone.
    new.name = name
