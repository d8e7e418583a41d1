"""A second backward pass beside the first one, with the approximations of a plan in it.

Every node that an approximated product flows into gets a second one, its image, computed from the
images of what it is computed from. So one step shows both gradients of the same batch.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node

from graphpass import joint_graph
from graphpass.joint_graph import aten
from graphpass.products import Operands, Replacement, approximate, exact_part, operands_of
from graphpass.splice import splice

_BACKWARD = aten.convolution_backward.default


class Shadow:
    """The second backward pass of one graph.

    Attributes:
        images: what stands for a node in the second pass, for those that differ.
        arrived: |exact product of the images - product|^2 of weight gradients, by node and result:
            the error that comes with the output gradient, without the weight gradient's own.
    """

    def __init__(
        self,
        graph: Graph,
        plan: Sequence[Replacement],
        weights: Collection[tuple[str, int | None]],
        seed: Node,
    ) -> None:
        """Add the second pass to the graph.

        Args:
            graph: a joint graph; what it returns stays as it is.
            plan: what is approximated; backward products.
            weights: node and result of every weight gradient.
            seed: int64 0-d node that the draws are hashed from.
        """
        self.images: dict[Node, Node] = {}
        self.arrived: dict[tuple[str, int | None], Node] = {}
        self._graph = graph
        self._seed = seed
        self._weights = weights
        self._plan = {(r.site.node, r.site.result): r for r in plan}
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target is not _BACKWARD:
                self._visit(node)

    def _visit(self, node: Node) -> None:
        source = node.args[0] if node.args else None
        if isinstance(source, Node) and source.target is _BACKWARD:
            self._visit_product(node, source, int(node.args[1]))  # type: ignore[arg-type]
        elif (node.name, None) in self._plan or (node.name, None) in self._weights:
            self._visit_product(node, node, None)
        elif any(argument in self.images for argument in node.all_input_nodes):
            self.images[node] = self._copy(node)

    def _visit_product(self, result: Node, node: Node, index: int | None) -> None:
        """Give an image to a product that is planned, or whose operands have one."""
        operands, _ = operands_of(node)
        images = {name: self.images.get(value, value) for name, value in operands.items()}
        key, moved = (node.name, index), images != operands
        replacement, is_weight = self._plan.get(key), key in self._weights
        if moved and (replacement is None or is_weight):
            exact = self._exact(result, images, index)
            self.images[result] = exact
            if is_weight:
                self.arrived[key] = distance(self._graph, exact, result)
        if replacement is not None:
            anchor = self.images.get(result, result).next
            self.images[result] = approximate(
                self._graph, anchor, replacement, images, self._seed, like=result
            )

    def _exact(self, result: Node, images: Operands, index: int | None) -> Node:
        if index is None:
            return self._copy(result)
        return exact_part(self._graph, result.next, result, images)

    def _copy(self, node: Node) -> Node:
        with self._graph.inserting_after(node):
            new = self._graph.node_copy(node, lambda other: self.images.get(other, other))
        # A value of its own: the compiler takes nodes with one storage for views of each other.
        arguments = torch.fx.map_arg((new.args, new.kwargs), lambda other: other.meta["val"])
        args, kwargs = arguments
        mode = detect_fake_mode(node.meta["val"])
        assert mode is not None and callable(new.target)
        with mode, torch.no_grad():
            new.meta = {**node.meta, "val": new.target(*args, **kwargs)}
        return new


def distance(graph: Graph, one: Node, other: Node) -> Node:
    """Return the sum of squared differences of two tensors, 0-d.

    Args:
        graph: the graph.
        one: a tensor; the operations are put behind it.
        other: the same, from before it.
    """
    wide = torch.promote_types(joint_graph.value_of(other).dtype, torch.float32)

    def squares(one: Tensor, other: Tensor) -> Any:
        return (one.to(wide) - other.to(wide)).square().sum()

    return splice(graph, one.next, squares, (one, other), like=other)
