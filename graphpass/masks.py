"""Where backward takes the mask of a ReLU from.

Backward asks of a ReLU where its output is zero. The partitioner would keep the answer as a mask,
a byte an element, wherever nothing else needs the output. Two things speak against it:

* If a product reads the output rounded to bfloat16, the rounded copy answers as well, as rounding
  keeps every zero and makes none (but of subnormal numbers below 2^-134).
* Inductor's C++ code stores masks element by element: a fused kernel that took 5 ms took 22 with a
  mask to store (16 channels, 32x32, batch 128, one AVX-512 core, torch 2.13). So on a CPU the mask
  of what a product reads is computed in backward, as in the exact graph, where the product's
  weight gradient has the output kept.
"""

import torch
from torch.fx import Graph, Node

from graphpass import joint_graph
from graphpass.joint_graph import aten

_ALIASES = (aten.alias.default, aten.detach.default)
_PRODUCTS = {
    aten.convolution.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
}
_CONVERT = torch.ops.prims.convert_element_type.default


def settle_masks(graph: Graph) -> int:
    """Take masks from rounded copies where there are some; return how many were."""
    count = 0
    for tensor, copies in _rounded_copies(graph).items():
        masks = _masks(tensor)
        if masks and not joint_graph.is_backward(tensor):
            _share(tensor, copies)
            for mask in masks:
                mask.update_arg(0, copies[0])
            count += len(masks)
    for node in graph.nodes:
        if node.target in _PRODUCTS and not joint_graph.is_backward(node):
            for operand in node.all_input_nodes:
                _compute_in_backward(_masks(joint_graph.source_of(operand)))
    return count


def _compute_in_backward(masks: list[Node]) -> None:
    for mask in masks:
        if joint_graph.value_of(mask).device.type == "cpu":
            # The partitioner's own word for what must not be computed ahead and kept.
            mask.meta["partitioner_tag"] = "must_be_in_backward"


def _rounded_copies(graph: Graph) -> dict[Node, list[Node]]:
    copies: dict[Node, list[Node]] = {}
    for node in graph.find_nodes(op="call_function", target=_CONVERT):
        if node.args[1] is torch.bfloat16 and isinstance(node.args[0], Node):
            copies.setdefault(node.args[0], []).append(node)
    return copies


def _share(tensor: Node, copies: list[Node]) -> None:
    """Let the first copy, made where the tensor is made, serve for all."""
    first, *others = copies
    tensor.append(first)
    first.meta["partitioner_tag"] = tensor.meta.get("partitioner_tag", "is_forward")
    for other in others:
        other.replace_all_uses_with(first)
        other.graph.erase_node(other)


def _masks(tensor: Node) -> list[Node]:
    """Return the masks that are taken from `tensor`, directly or through aliases and copies."""
    masks: list[Node] = []
    for user in tensor.users:
        if user.target in _ALIASES or user.target is _CONVERT:
            masks += _masks(user)
        elif user.target is aten.le.Scalar and user.args[1] == 0 and joint_graph.is_backward(user):
            masks.append(user)
    return masks
