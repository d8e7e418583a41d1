"""Where gradients flow: from input gradients to the weights before them, and to the parameters."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from torch.fx import Graph, Node

from graphpass import joint_graph
from graphpass.joint_graph import aten
from graphpass.site import Gradient, Site


@dataclass(frozen=True, slots=True)
class Flow:
    """What depends on what in the backward part of one graph.

    Attributes:
        reached: weight gradients that each input gradient flows into, by site.
        weights: positions, among the graph's inputs, of the parameters whose gradient each weight
            gradient is a part of, by site.
    """

    reached: dict[str, tuple[str, ...]] = field(default_factory=dict)
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)


def find_flow(graph: Graph, sites: Sequence[Site], parameters: Collection[int]) -> Flow:
    """Return how gradients flow through a joint graph.

    Args:
        graph: a joint graph.
        sites: its products.
        parameters: positions of the parameters among the example inputs.
    """
    made = {(site.node, site.result): number for number, site in enumerate(sites)}
    # One bit a site: those whose products a node is computed from.
    sources: dict[Node, int] = {}
    reached: list[int] = [0] * len(sites)
    for node in graph.nodes:
        above = 0
        for source in node.all_input_nodes:
            above |= sources.get(source, 0)
        number = made.get(_product_of(node))
        if number is not None:
            for other in _bits(above):
                reached[other] |= 1 << number
            above |= 1 << number
        sources[node] = above
    ends = joint_graph.gradients(graph)
    kept = {i: sources[node] for i, node in ends.items() if i in parameters}
    inputs = [i for i, site in enumerate(sites) if site.gradient is Gradient.INPUT]
    weights = [i for i, site in enumerate(sites) if site.gradient is Gradient.WEIGHT]
    return Flow(
        {sites[i].id: tuple(sites[w].id for w in weights if reached[i] >> w & 1) for i in inputs},
        {sites[w].id: tuple(p for p, above in kept.items() if above >> w & 1) for w in weights},
    )


def _product_of(node: Node) -> tuple[str, int | None]:
    """Return what names the product that `node` is: node and result."""
    source = node.args[0] if node.args else None
    if isinstance(source, Node) and source.target is aten.convolution_backward.default:
        index = node.args[1]
        return source.name, index if isinstance(index, int) else None
    return node.name, None


def _bits(number: int) -> Iterator[int]:
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest
