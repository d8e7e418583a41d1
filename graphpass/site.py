"""Sites: the convolutions and matrix products of a joint graph, forward and backward.

One site is one product. A `convolution_backward` node holds up to two of them: the input gradient
(result 0) and the weight gradient (result 1). Letters: B batch, M rows, K contracted, N columns,
Ci and Co input and output channels.
"""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch.fx import Graph, Node

from cost_model import (
    ConvShape,
    Cost,
    Shape,
    attention,
    attention_backward,
    convolution,
    convolution_input_grad,
    convolution_weight_grad,
    element_count,
    matmul,
)
from graphpass import joint_graph
from graphpass.errors import Reason
from graphpass.joint_graph import aten

# Where a product belongs to no module of the model.
_MODEL = "(model)"

# What methods call the factors of a forward product, among the operands of its gradients.
FACTORS = ("forward_left", "forward_right")


class Gradient(StrEnum):
    """Which product of a layer a site is."""

    FORWARD = "forward"
    INPUT = "input"
    WEIGHT = "weight"


@dataclass(frozen=True, slots=True)
class ConvGeometry:
    """How a convolution walks over its input; one number a spatial axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


@dataclass(frozen=True, slots=True)
class Site:
    """One convolution or matrix product that may be approximated.

    Attributes:
        name: module path a user knows, with `#n` for the n-th product of this module.
        path: module path alone, such as "layer2.0.conv1"; "" for the model itself.
        gradient: which product of the layer this is.
        op: "convolution", "mm", "addmm", "bmm", "baddbmm" or "attention".
        node: name of the node in the joint graph.
        result: index into the node's results; None where the node has one result.
        layer: number of the layer in forward order, from 1.
        shapes: shapes of the operands. Convolutions: x [B, Ci, ...], w, y [B, Co, ...]; matrix
            products: left and right factor; attention: query, key, value.
        output: shape of the product.
        dtype: name of the operands' dtype, such as "float32".
        itemsize: bytes of one element.
        conv: geometry of a convolution.
        reason: why no method can apply, where that is known from the graph alone.
        number: tells apart the gradients of both factors, where neither is a weight; from 1.
        factors: names of the nodes that the forward product of a layer multiplies; () if it is not
            known, and for what is no gradient of a matrix product.
        outer: axis of such a gradient along which it has what the forward product sums over.
        device: type of device that it is computed on.
        factor: which of `factors` such a gradient multiplies by; of a weight gradient, the other
            one is the weight.
    """

    name: str
    path: str
    gradient: Gradient
    op: str
    node: str
    result: int | None
    layer: int
    shapes: tuple[Shape, ...]
    output: Shape
    dtype: str
    itemsize: int
    conv: ConvGeometry | None = None
    reason: Reason | None = None
    number: int = 1
    factors: tuple[str, ...] = ()
    outer: int | None = None
    device: str = "cpu"
    factor: int | None = None

    @property
    def id(self) -> str:
        """The name a plan uses: module path and gradient; unique in a graph."""
        number = f".{self.number}" if self.number > 1 else ""
        return f"{self.name}:{self.gradient.value}{number}"

    @property
    def cost(self) -> Cost:
        """FLOPs and bytes of the exact product."""
        return _exact_cost(self)


def find_sites(graph: Graph, parameters: Collection[int], prefix: "PathOf") -> tuple[Site, ...]:
    """Return every product of a joint graph, in the order of the graph.

    Args:
        graph: a joint graph.
        parameters: positions of the parameters among the example inputs.
        prefix: maps a traced module path to the path that the user knows.
    """
    finder = _Finder(graph, parameters, prefix)
    seen: Counter[str] = Counter()
    sites = []
    for node in graph.nodes:
        for site in finder.sites_at(node):
            seen[site.id] += 1
            sites.append(replace(site, number=seen[site.id]))
    return tuple(sites)


def is_product(node: Node) -> bool:
    """Return whether a node computes products: one, or both gradients of a convolution."""
    return node.target in _OPS


PathOf = Callable[[str], str]


class _Finder:
    """Recognises products; holds what must be known of the whole graph to do so."""

    def __init__(self, graph: Graph, parameters: Collection[int], prefix: PathOf) -> None:
        self.dependent = joint_graph.data_dependent(graph, parameters)
        self.prefix = prefix
        self.forward: dict[int, Node] = {}
        self.layers: dict[str, int] = {}
        products: dict[str, list[str]] = {}
        for node in graph.nodes:
            if node.target in _OPS and not joint_graph.is_backward(node):
                self.forward.setdefault(node.meta.get("seq_nr", -1), node)
                has_weight = any(operand not in self.dependent for operand in _factors(node))
                count = max(self.layers.values(), default=0)
                self.layers[node.name] = count + 1 if has_weight else max(count, 1)
                path = prefix(joint_graph.module_path(node))
                products.setdefault(path, []).append(node.name)
        # The products of one use of a module share a name: that of the forward product.
        self.names = {
            node: f"{path or _MODEL}#{number}" if len(nodes) > 1 else path or _MODEL
            for path, nodes in products.items()
            for number, node in enumerate(nodes, start=1)
        }

    def sites_at(self, node: Node) -> list[Site]:
        """Return the sites that `node` computes: none, one or two."""
        op = _OPS.get(node.target)
        if op is None:
            return []
        if node.target is aten.convolution_backward.default:
            mask = node.args[10]
            gradients = {0: Gradient.INPUT, 1: Gradient.WEIGHT}
            return [
                self._site(node, op, gradients[i], i)
                for i in gradients
                if mask[i]  # type: ignore[index]
            ]
        gradient, reason = self._gradient(node)
        if op == "attention":
            reason = Reason.FUSED
        return [self._site(node, op, gradient, None, reason)]

    def _forward_factors(
        self, node: Node, op: str
    ) -> tuple[tuple[str, ...], int | None, int | None]:
        """Name the factors of a gradient's forward product, and say what comes from them.

        Returns:
            Their names; the axis of the gradient, and the factor, that it has from one of them.
        """
        forward = self.forward.get(node.meta.get("seq_nr", -2))
        if forward is None or op not in {"mm", "addmm"} or not joint_graph.is_backward(node):
            return (), None, None
        known = [joint_graph.source_of(factor) for factor in _factors(forward)]
        # One factor is the gradient of the output; the axis of the other one that is not contracted
        # here is the one that was contracted there.
        shared = [joint_graph.source_of(factor) in known for factor in _factors(node)]
        if sum(shared) != 1:
            return (), None, None
        axis = shared.index(True)
        factor = known.index(joint_graph.source_of(_factors(node)[axis]))
        return tuple(factor.name for factor in _factors(forward)), axis, factor

    def _gradient(self, node: Node) -> tuple[Gradient, Reason | None]:
        """Say which gradient a matrix product is: the one with respect to the missing factor."""
        if not joint_graph.is_backward(node):
            return Gradient.FORWARD, None
        forward = self.forward.get(node.meta.get("seq_nr", -2))
        if forward is None or len(_factors(forward)) < 2:
            return Gradient.INPUT, Reason.NO_COUNTERPART
        left, right = _factors(forward)[:2]
        mine = {joint_graph.source_of(operand) for operand in _factors(node)}
        if joint_graph.source_of(left) in mine:
            wanted = right
        elif joint_graph.source_of(right) in mine:
            wanted = left
        else:
            return Gradient.INPUT, Reason.NO_COUNTERPART
        return (Gradient.INPUT if wanted in self.dependent else Gradient.WEIGHT), None

    def _site(
        self,
        node: Node,
        op: str,
        gradient: Gradient,
        result: int | None,
        reason: Reason | None = None,
    ) -> Site:
        forward = self.forward.get(node.meta.get("seq_nr", -2), node)
        path = self.prefix(joint_graph.module_path(forward) or joint_graph.module_path(node))
        value = joint_graph.value_of(_factors(node)[0])
        shapes, output, conv = _shapes(node, op, result)
        factors, outer, factor = self._forward_factors(node, op)
        return Site(
            name=self.names.get(forward.name, path or _MODEL),
            path=path,
            gradient=gradient,
            op=op,
            node=node.name,
            result=result,
            layer=self.layers.get(forward.name, 1),
            shapes=shapes,
            output=output,
            dtype=str(value.dtype).removeprefix("torch."),
            itemsize=value.dtype.itemsize,
            conv=conv,
            reason=reason if value.dtype.is_floating_point else Reason.UNSUPPORTED_DTYPE,
            factors=factors,
            outer=outer,
            device=value.device.type,
            factor=factor,
        )


def _factors(node: Node) -> list[Node]:
    """Return the operands of a product, without the addend of `addmm` and `baddbmm`."""
    first, count = _OPERANDS[node.target]
    return [arg for arg in node.args[first : first + count] if isinstance(arg, Node)]


def _shapes(
    node: Node, op: str, result: int | None
) -> tuple[tuple[Shape, ...], Shape, ConvGeometry | None]:
    def shape(operand: object) -> Shape:
        assert isinstance(operand, Node)
        return joint_graph.dims_of(joint_graph.value_of(operand).shape)

    if node.target is aten.convolution.default:
        x, w = shape(node.args[0]), shape(node.args[1])
        y = joint_graph.dims_of(node.meta["val"].shape)
        return (x, w, y), y, _geometry(node.args[3:9])
    if node.target is aten.convolution_backward.default:
        y, x, w = (shape(arg) for arg in node.args[:3])
        return (x, w, y), (x if result == 0 else w), _geometry(node.args[4:10])
    factors = tuple(shape(factor) for factor in _factors(node))
    value = node.meta["val"]
    output = value if isinstance(value, torch.Tensor) else value[0]
    return factors, joint_graph.dims_of(output.shape), None


def _geometry(args: tuple[Any, ...]) -> ConvGeometry:
    stride, padding, dilation, transposed, output_padding, groups = args
    return ConvGeometry(
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        bool(transposed),
        tuple(output_padding),
        groups,
    )


def _exact_cost(site: Site) -> Cost:
    if site.conv is not None:
        x, w, y = site.shapes
        product = {
            Gradient.FORWARD: convolution,
            Gradient.INPUT: convolution_input_grad,
            Gradient.WEIGHT: convolution_weight_grad,
        }[site.gradient]
        shape = ConvShape(x, w, y, site.conv.groups, site.conv.transposed)
        return product(shape, site.itemsize)
    if site.op == "attention":
        query, key, value = site.shapes
        count = attention if site.gradient is Gradient.FORWARD else attention_backward
        return count(
            element_count(query[:-2]),
            query[-2],
            key[-2],
            query[-1],
            value[-1],
            itemsize=site.itemsize,
            kv_batch_heads=element_count(key[:-2]),
        )
    left, right = site.shapes
    batch = element_count(left[:-2])
    bias = right[-1] if site.op in {"addmm", "baddbmm"} else 0
    return matmul(batch, left[-2], left[-1], right[-1], site.itemsize, bias_elements=bias)


_OPS: dict[Any, str] = {
    aten.convolution.default: "convolution",
    aten.convolution_backward.default: "convolution",
    aten.mm.default: "mm",
    aten.addmm.default: "addmm",
    aten.bmm.default: "bmm",
    aten.baddbmm.default: "baddbmm",
    aten._scaled_dot_product_flash_attention_for_cpu.default: "attention",
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: "attention",
    aten._scaled_dot_product_flash_attention.default: "attention",
    aten._scaled_dot_product_flash_attention_backward.default: "attention",
    aten._scaled_dot_product_efficient_attention.default: "attention",
    aten._scaled_dot_product_efficient_attention_backward.default: "attention",
    aten._scaled_dot_product_cudnn_attention.default: "attention",
    aten._scaled_dot_product_cudnn_attention_backward.default: "attention",
}

# Position of the first factor among the arguments, and the number of factors. The backward
# attention operators take the gradient of the output before query, key and value.
_OPERANDS: dict[Any, tuple[int, int]] = {
    target: {
        "convolution": (0, 2),
        "mm": (0, 2),
        "addmm": (1, 2),
        "bmm": (0, 2),
        "baddbmm": (1, 2),
        "attention": (1, 3) if "backward" in str(target) else (0, 3),
    }[op]
    for target, op in _OPS.items()
}
