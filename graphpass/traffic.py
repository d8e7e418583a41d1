"""What the rest of a step moves: the bytes of everything in a joint graph that is no product.

A fusing compiler runs such operations together: one kernel reads what the operations read from
memory, and writes what others need later. Here, as in Inductor,

- a product, and any other operation that is not computed point by point, is a kernel of its own;
- operations fuse with what they read or share reads with, unless a reduction or a product lies
  between them: its result is needed in whole;
- a forward value that no product reads is not kept for later kernels where it can be computed
  again from a single tensor that is kept.
"""

import math
import operator
from collections.abc import Iterable

import torch
from torch.fx import Graph, Node

from graphpass import joint_graph
from graphpass.site import is_product

_REDUCTIONS = frozenset(
    {
        "sum", "mean", "var", "var_mean", "amax", "amin", "prod", "argmax", "argmin", "any", "all",
        "max", "min", "std", "logsumexp", "native_layer_norm", "native_group_norm",
    }
)  # fmt: skip
# Smaller tensors, such as the statistics of channels, do not decide what is computed again.
_SMALL_BYTES = 2**16


def kernel_bytes(graph: Graph) -> tuple[int, ...]:
    """Return the bytes that each kernel reads and writes, products left out.

    Args:
        graph: a joint graph, as Inductor's joint passes see it.
    """
    fused = _Fusion(graph)
    return tuple(sorted(filter(None, map(fused.bytes_of, fused.groups()))))


class _Fusion:
    """The operations of a graph, and which of them share a kernel."""

    def __init__(self, graph: Graph) -> None:
        self.nodes = [node for node in graph.nodes if _computes(node)]
        self.order = {node: number for number, node in enumerate(self.nodes)}
        self.stage: dict[Node, int] = {}
        for node in self.nodes:
            self.stage[node] = max(map(self._stage_after, self._sources(node)), default=0)
        self.parent: dict[Node, Node] = {node: node for node in self.nodes}
        self._unite()
        self.kept = {node for node in self.nodes if self._is_kept(node)}

    def groups(self) -> list[list[Node]]:
        """Return the operations of every kernel that is no product."""
        members: dict[Node, list[Node]] = {}
        for node in self.nodes:
            if not is_product(node):
                members.setdefault(self._root(node), []).append(node)
        return list(members.values())

    def bytes_of(self, group: list[Node]) -> int:
        """Return the bytes that a kernel reads and writes."""
        inside = set(group)
        read: set[Node] = set()
        for node in group:
            for source in self._sources(node):
                if source not in inside:
                    read |= self._kept_below(source)
        written = [node for node in group if node in self.kept]
        return sum(_bytes(node) for node in (*read, *written))

    def _stage_after(self, source: Node) -> int:
        """Return the first stage in which a value can be read."""
        if source not in self.order:
            return 0
        return self.stage[source] + (0 if _is_pointwise(source) else 1)

    def _unite(self) -> None:
        """Put together what reads the same value, or what another has just computed."""
        readers: dict[tuple[Node, int, bool], Node] = {}
        for node in self.nodes:
            if not (_is_pointwise(node) or _is_reduction(node)):
                continue
            stage, backward = self.stage[node], joint_graph.is_backward(node)
            for source in self._sources(node):
                key = source, stage, backward
                if source in self.order and self._fits(source, stage, backward):
                    self._join(node, source)
                elif _bytes(source) >= _SMALL_BYTES:
                    self._join(node, readers.setdefault(key, node))

    def _fits(self, source: Node, stage: int, backward: bool) -> bool:
        return (
            _is_pointwise(source)
            and self.stage[source] == stage
            and joint_graph.is_backward(source) == backward
        )

    def _is_kept(self, node: Node) -> bool:
        """Return whether a value is written to memory."""
        if not _is_pointwise(node):
            return True
        root, later = self._root(node), False
        for user in _users(node):
            if user.op == "output" or is_product(user) or not self._can_fuse(user):
                return True
            later |= self._root(user) is not root
        return later and self._sources_kept(node) > 1

    def _can_fuse(self, user: Node) -> bool:
        return _is_pointwise(user) or _is_reduction(user)

    def _sources_kept(self, node: Node) -> int:
        """Return how many large tensors a value can be computed again from."""
        seen, large, todo = set[Node](), 0, list(self._sources(node))
        while todo:
            source = todo.pop()
            if source in seen:
                continue
            seen.add(source)
            if source in self.order and _is_pointwise(source) and not self._is_read_whole(source):
                todo += self._sources(source)
            else:
                large += _bytes(source) >= _SMALL_BYTES
        return large

    def _is_read_whole(self, node: Node) -> bool:
        return any(user.op == "output" or is_product(user) for user in _users(node))

    def _kept_below(self, source: Node) -> set[Node]:
        """Return the values in memory that a value is read, or computed again, from."""
        found, todo, seen = set[Node](), [source], set[Node]()
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if node not in self.order or node in self.kept:
                found.add(node)
            else:
                todo += self._sources(node)
        return found

    def _sources(self, node: Node) -> list[Node]:
        return [source for source in map(_storage, node.all_input_nodes) if _bytes(source)]

    def _root(self, node: Node) -> Node:
        while self.parent[node] is not node:
            node = self.parent[node]
        return node

    def _join(self, one: Node, other: Node) -> None:
        one, other = self._root(one), self._root(other)
        first, second = sorted((one, other), key=self.order.__getitem__)
        self.parent[second] = first


def _computes(node: Node) -> bool:
    """Return whether a node makes values, in memory of its own."""
    return node.op == "call_function" and _storage(node) is node and _bytes(node) > 0


def _storage(node: Node) -> Node:
    """Return the node that makes the memory behind a value: past views and choices of results."""
    while True:
        source = joint_graph.storage_of(node)
        if source.target is operator.getitem:
            (source,) = source.all_input_nodes
        if source is node:
            return node
        node = source


def _users(node: Node) -> Iterable[Node]:
    """Yield what reads a value, through views and choices of results."""
    for user in node.users:
        if user.op != "output" and _storage(user) is not user:
            yield from _users(user)
        else:
            yield user


def _name(node: Node) -> str:
    return str(getattr(node.target, "_opname", node.target))


def _is_reduction(node: Node) -> bool:
    return _name(node) in _REDUCTIONS


def _is_pointwise(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or _name(node) in _POINTWISE


# Computed point by point, without being tagged so.
_POINTWISE = frozenset(
    {
        "convert_element_type", "_to_copy", "clone", "full", "full_like", "empty", "iota", "fma",
        "scalar_tensor", "zeros", "ones", "slice_scatter", "cat", "constant_pad_nd", "slice",
        "select", "copy_", "copy", "index", "arange",
    }
)  # fmt: skip


def _bytes(node: Node) -> int:
    """Return the bytes of a node's values; 0 if it has none."""
    values = node.meta.get("val")
    tensors = values if isinstance(values, tuple | list) else (values,)
    return sum(
        math.prod(map(_hint, tensor.shape)) * tensor.dtype.itemsize
        for tensor in tensors
        if isinstance(tensor, torch.Tensor)
    )


def _hint(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint)
