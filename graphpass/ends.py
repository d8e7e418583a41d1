"""Where weight gradients end: the parameters whose gradients they are a part of."""

import operator
from collections.abc import Collection, Sequence

import torch
from torch.fx import Graph, Node

from graphpass import joint_graph
from graphpass.site import Gradient, Site

# Position of a weight gradient among the sites, position of a parameter among the graph's inputs.
# A weight that is used twice has two weight gradients; a weight made from two parameters is the end
# of one in both.
Ends = tuple[tuple[int, int], ...]

_BACKWARD = torch.ops.aten.convolution_backward.default


def ends_of(graph: Graph, sites: Sequence[Site], parameters: Collection[int]) -> Ends:
    """Return where the weight gradients of a joint graph end.

    Args:
        graph: a joint graph.
        sites: its products.
        parameters: positions of the parameters among the example inputs.
    """
    numbers = {
        (site.node, site.result): number
        for number, site in enumerate(sites)
        if site.gradient is Gradient.WEIGHT
    }
    # One bit a weight gradient: those that a node is computed from.
    sources: dict[Node, int] = {}
    for node in graph.nodes:
        bits = 0
        for source in node.all_input_nodes:
            bits |= sources.get(source, 0)
        number = numbers.get(_name_of(node))
        if number is not None:
            bits |= 1 << number
        if bits:
            sources[node] = bits
    return tuple(
        (number, position)
        for position, node in sorted(joint_graph.gradients(graph).items())
        for number in numbers.values()
        if position in parameters and sources.get(node, 0) >> number & 1
    )


def _name_of(node: Node) -> tuple[str, int | None]:
    """Return what names the product that `node` is, if it is one: node and result."""
    source = node.args[0] if node.args else None
    if node.target is operator.getitem and isinstance(source, Node) and source.target is _BACKWARD:
        index = node.args[1]
        return source.name, index if isinstance(index, int) else None
    return node.name, None
