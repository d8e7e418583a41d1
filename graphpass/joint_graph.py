"""Read-only questions about a joint forward-backward graph, as Inductor's joint passes see it.

Facts relied on (torch 2.11 to 2.13): every node carries `partitioner_tag` ("is_forward" or
"is_backward"); a backward node has the `seq_nr` of the forward operation it belongs to; inputs are
described by `meta["desc"]`, whose `idx` is the position among the example inputs.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from cost_model import Shape

aten = torch.ops.aten
prims = torch.ops.prims

# Operations that show the same memory in another way.
_ALIASES = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.expand.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.unsqueeze.default,
        aten.alias.default,
        aten.detach.default,
    }
)
# Operations that move, relabel or cast values without computing with them.
_VIEWS = _ALIASES | {
    aten.reshape.default,
    aten.clone.default,
    aten._to_copy.default,
    prims.convert_element_type.default,
}


def is_backward(node: Node) -> bool:
    """Return whether `node` belongs to the backward part."""
    return node.meta.get("partitioner_tag") == "is_backward"


def source_of(node: Node) -> Node:
    """Return the node whose values `node` shows through views, copies and casts."""
    while node.target in _VIEWS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def storage_of(node: Node) -> Node:
    """Return the node that made the memory `node` shows."""
    while node.target in _ALIASES and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def dims_of(shape: Sequence[int | torch.SymInt]) -> Shape:
    """Return a shape with every symbolic size as a sympy expression."""
    return tuple(size if isinstance(size, int) else size.node.expr for size in shape)


def value_of(node: Node) -> torch.Tensor:
    """Return the fake tensor that stands for the value of `node`."""
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor), node.format_node()
    return value


def input_index(node: Node) -> int | None:
    """Return the position of a placeholder among the example inputs; None for anything else."""
    index = getattr(node.meta.get("desc"), "idx", None)
    return index if isinstance(index, int) else None


def data_dependent(graph: Graph, parameters: Collection[int]) -> frozenset[Node]:
    """Return the nodes that depend on anything other than parameters.

    Args:
        graph: a joint graph.
        parameters: positions of the parameters among the example inputs.
    """
    reached: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if input_index(node) not in parameters or "tangents" in str(node.target):
                reached.add(node)
        elif any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return frozenset(reached)


def output_values(graph: Graph) -> list[Any]:
    """Return what the graph returns, flattened: nodes, constants and None."""
    (output,) = graph.find_nodes(op="output")
    leaves: list[Any] = torch.utils._pytree.tree_leaves(
        output.args[0], is_leaf=lambda leaf: leaf is None
    )
    return leaves


def gradients(graph: Graph) -> dict[int, Node]:
    """Return the gradients that the graph returns, by the position of the input they belong to."""
    (output,) = graph.find_nodes(op="output")
    descriptions = output.meta.get("desc") or []
    found = {}
    for value, description in zip(output_values(graph), descriptions, strict=False):
        index = getattr(getattr(description, "grad_of", None), "idx", None)
        if isinstance(value, Node) and isinstance(index, int):
            found[index] = value
    return found


def module_path(node: Node) -> str:
    """Return the path of the module that `node` was traced in, relative to the traced frame.

    The first component is how the frame names its module, such as `L['self']`; the path of the
    outermost module is that component alone. A module called again is shown as the first call.
    """
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return re.sub(r"@\d+", "", paths[-1]) if paths else ""


def split_root(path: str) -> tuple[str, str]:
    """Return (name of the local or global variable, path below it) of a traced module path."""
    match = re.match(r"[LG]\['([^']*)'\]", path)
    if match is None:
        return "", path
    return match.group(1), _dotted(path[match.end() :])


def _dotted(path: str) -> str:
    path = re.sub(r"\._modules\['([^']*)'\]", r".\1", path)
    path = re.sub(r"\[['\"]?([^'\"\]]*)['\"]?\]", r".\1", path)
    return path.strip(".")
