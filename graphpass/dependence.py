"""Which products an error in a gradient reaches.

An error in an input gradient goes on to the layers before it: through normalisations, activations
and shortcuts, into the weight gradients there, and into further input gradients. What is kept of
the joint graph for that question is a small directed graph: the sites, by their position, one place
for the graphs before this one, by the number of sites, and the few places besides where several
gradients meet and part again (shortcuts), by higher numbers.
"""

import operator
from collections.abc import Collection, Hashable, Iterator, Sequence

import networkx
import torch
from torch.fx import Graph, Node

from graphpass import joint_graph
from graphpass.noise import Reach
from graphpass.site import Gradient, Site

# Edges from a place to one that it flows into. Fewer than a few for each site, also where residual
# blocks make every layer depend on every later one.
Flow = tuple[tuple[int, int], ...]

_BACKWARD = torch.ops.aten.convolution_backward.default


def flow_of(graph: Graph, sites: Sequence[Site], parameters: Collection[int]) -> Flow:
    """Return how gradients flow from product to product.

    Args:
        graph: a joint graph.
        sites: its products.
        parameters: positions of the parameters among the example inputs.
    """
    places: dict[str, list[int]] = {}
    for number, site in enumerate(sites):
        if site.gradient is not Gradient.FORWARD:
            places.setdefault(site.node, []).append(number)
    flow = networkx.DiGraph()
    for node in graph.nodes:
        if not joint_graph.is_backward(node):
            continue
        heads: Sequence[Hashable] = places.get(node.name) or [node.name]
        for source in node.all_input_nodes:
            if joint_graph.is_backward(source):
                tails = _tails(source, node, places, sites)
                flow.add_edges_from((tail, head) for tail in tails for head in heads)
    flow.add_edges_from((node.name, len(sites)) for node in _leaving(graph, parameters))
    return _numbered(_contracted(flow), graph, len(sites))


def reached(flow: Flow, sites: Sequence[Site]) -> dict[int, tuple[int, ...]]:
    """Return the weight gradients that the errors of each site reach, by position.

    Those of a weight gradient reach nothing, and those of a forward product every one of them. What
    leaves the graph for one before it, of which nothing is known here, counts as much as if it
    reached every one of this graph too.
    """
    weights = [i for i, site in enumerate(sites) if site.gradient is Gradient.WEIGHT]
    mask = sum(1 << i for i in weights)
    below = _closure(flow)
    result = {}
    for number, site in enumerate(sites):
        bits = below.get(number, 0)
        if site.gradient is Gradient.FORWARD or bits >> len(sites) & 1:
            bits = mask
        wanted = () if site.gradient is Gradient.WEIGHT else weights
        result[number] = tuple(i for i in wanted if bits >> i & 1)
    return result


def reach_of(flow: Flow, sites: Sequence[Site]) -> Reach:
    """Return the weight gradients that each input gradient flows into, by the sites' ids."""
    return {
        sites[number].id: tuple(sites[i].id for i in found)
        for number, found in reached(flow, sites).items()
        if sites[number].gradient is Gradient.INPUT
    }


def _closure(flow: Flow) -> dict[int, int]:
    """Return what lies behind each place, as a set of bits."""
    graph = networkx.DiGraph(flow)
    below: dict[int, int] = {}
    for place in reversed(list(networkx.topological_sort(graph))):
        bits = 0
        for following in graph[place]:
            bits |= below[following] | 1 << following
        below[place] = bits
    return below


def _leaving(graph: Graph, parameters: Collection[int]) -> Iterator[Node]:
    """Yield the gradients that are handed to another graph, or to the user: no parameter's."""
    placeholders = graph.find_nodes(op="placeholder")
    inputs = [node for node in placeholders if "tangents" not in str(node.target)]
    results = joint_graph.output_values(graph)
    if len(inputs) == len(placeholders) or len(results) < len(inputs):
        # Without tangents there is no backward part: joint passes see such graphs too.
        return
    # The last results are the gradients of the inputs, one each.
    for node, gradient in zip(inputs, results[len(results) - len(inputs) :], strict=True):
        if isinstance(gradient, Node) and joint_graph.input_index(node) not in parameters:
            yield gradient


def _tails(
    source: Node, node: Node, places: dict[str, list[int]], sites: Sequence[Site]
) -> Sequence[Hashable]:
    """Return the places whose values `node` takes from `source`."""
    numbers = places.get(source.name)
    if numbers is None:
        return [source.name]
    if source.target is _BACKWARD and node.target is operator.getitem:
        return [number for number in numbers if sites[number].result == node.args[1]]
    return numbers


def _contracted(flow: "networkx.DiGraph[Hashable]") -> "networkx.DiGraph[Hashable]":
    """Take out every place that is no site, unless that would add edges."""
    order = list(networkx.topological_sort(flow))
    # What no product reads, and what comes from none, first: the rest has fewer branches then.
    for name in reversed(order):
        if isinstance(name, str) and not flow.out_degree(name):
            flow.remove_node(name)
    for name in order:
        if name not in flow or not isinstance(name, str):
            continue
        before, after = list(flow.predecessors(name)), list(flow.successors(name))
        if len(before) * len(after) <= len(before) + len(after):
            flow.remove_node(name)
            flow.add_edges_from((tail, head) for tail in before for head in after)
    return flow


def _numbered(flow: "networkx.DiGraph[Hashable]", graph: Graph, sites: int) -> Flow:
    kept = [node.name for node in graph.nodes if node.name in flow]
    numbers = {name: number for number, name in enumerate(kept, start=sites + 1)}
    edges = ((numbers.get(tail, tail), numbers.get(head, head)) for tail, head in flow.edges)
    return tuple(sorted(edges))
