"""Replace planned sites of a joint graph by their approximations.

The graph that is rewritten is always a private copy: every compiled variant is traced anew from
the user's graph, so that a failure here leaves the exact graph untouched.
"""

from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from graphpass import joint_graph, verify
from graphpass.errors import RewriteError
from graphpass.joint_graph import aten
from graphpass.keeping import key_of, slots_of
from graphpass.masks import settle_masks
from graphpass.products import KeptNodes, Replacement, approximate, exact_part, operands_of

__all__ = ["Replacement", "rewrite", "seed_placeholder"]


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
    inputs = _Inputs(graph, replacements, seed)
    fired = 0
    for name, group in _by_node(replacements).items():
        if name not in nodes:
            raise RewriteError(f"the graph has no node {name!r} for {group[0].site.id}")
        try:
            fired += _rewrite_node(graph, nodes[name], group, inputs)
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
    seed = _inputs_of(graph)[-1]
    value = joint_graph.value_of(seed)
    assert value.dtype == torch.int64 and value.dim() == 0, seed.format_node()
    return seed


class _Inputs:
    """What is added to the inputs of a graph: state of methods, step, seed, in this order."""

    def __init__(self, graph: Graph, replacements: Sequence[Replacement], seed: Node) -> None:
        self.seed = seed
        keys = list(slots_of(replacements))
        *before, self._step, _ = _inputs_of(graph) if keys else (seed, seed)
        self._kept = dict(zip(keys, before[len(before) - len(keys) :], strict=True))

    def kept_of(self, replacement: Replacement) -> KeptNodes | None:
        """Return the state of a site, or None if its method keeps nothing."""
        slots = replacement.method.state(replacement.site, replacement.params)
        if not slots:
            return None
        nodes = {slot.name: self._kept[key_of(replacement, slot)] for slot in slots}
        return KeptNodes(self._step, nodes)


def _inputs_of(graph: Graph) -> list[Node]:
    """Return the placeholders of a joint graph that are no tangents."""
    return [
        node for node in graph.find_nodes(op="placeholder") if "tangents" not in str(node.target)
    ]


def _by_node(replacements: Sequence[Replacement]) -> dict[str, list[Replacement]]:
    groups: dict[str, list[Replacement]] = {}
    for replacement in replacements:
        groups.setdefault(replacement.site.node, []).append(replacement)
    return groups


def _rewrite_node(graph: Graph, node: Node, group: list[Replacement], inputs: _Inputs) -> int:
    if node.target is aten.convolution_backward.default:
        return _rewrite_convolution(graph, node, group, inputs)
    (replacement,) = group
    operands, addend = operands_of(node)
    kept = inputs.kept_of(replacement)
    new = approximate(graph, node, replacement, operands, inputs.seed, node, addend, kept)
    _replace(graph, node, new)
    return 1


def _rewrite_convolution(
    graph: Graph, node: Node, group: list[Replacement], inputs: _Inputs
) -> int:
    """Take a `convolution_backward` apart and approximate the planned products of it."""
    operands, _ = operands_of(node)
    planned = {replacement.site.result: replacement for replacement in group}
    fired = 0
    for user in list(node.users):
        index = user.args[1]
        replacement = planned.get(index)  # type: ignore[arg-type]
        if replacement is not None:
            kept = inputs.kept_of(replacement)
            new = approximate(graph, node, replacement, operands, inputs.seed, user, kept=kept)
            fired += 1
        else:
            new = exact_part(graph, node, user, operands)
        _replace(graph, user, new)
    graph.erase_node(node)
    return fired


def _replace(graph: Graph, old: Node, new: Node) -> None:
    """Let `new` take the place and the name of `old`."""
    old.replace_all_uses_with(new)
    name = old.name
    graph.erase_node(old)
    # Consumers identify results by name; the name is free again, as its node is gone.
    new.name = name
