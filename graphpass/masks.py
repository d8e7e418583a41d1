"""Let a ReLU's mask be taken from the rounded copy of its output that is kept anyway.

Backward asks of a ReLU where its output is zero. If a product reads that output rounded to
bfloat16, the rounded copy answers as well, as rounding keeps every zero and makes none (but of
subnormal numbers below 2^-134). Otherwise a mask would be kept beside the copy: a byte an element,
and Inductor's C++ code stores masks element by element (a fused kernel that took 5 ms took 22 with
a mask to store: 16 channels, 32x32, batch 128, one AVX-512 core, torch 2.13).

A copy in 8 bits, rounded at random, makes zeros: it cannot answer. There the output itself is kept,
as exact training keeps it, and the copy is made in backward like the mask.
"""

import torch
from torch.fx import Graph, Node

from codegen.kernel import kernels
from graphpass import joint_graph
from graphpass.joint_graph import aten

_ALIASES = (aten.alias.default, aten.detach.default)
_CONVERT = torch.ops.prims.convert_element_type.default


def read_masks_from_copies(graph: Graph) -> int:
    """Rewire every mask of a tensor that has a bfloat16 copy; return how many there were."""
    copies: dict[Node, list[Node]] = {}
    for node in graph.find_nodes(op="call_function", target=_CONVERT):
        if node.args[1] is torch.bfloat16 and isinstance(node.args[0], Node):
            copies.setdefault(node.args[0], []).append(node)
    count = 0
    for tensor, (first, *others) in copies.items():
        masks = _masks(tensor)
        if not masks or joint_graph.is_backward(tensor):
            continue
        # One copy, made where the tensor is made.
        tensor.append(first)
        first.meta["partitioner_tag"] = tensor.meta.get("partitioner_tag", "is_forward")
        for other in others:
            other.replace_all_uses_with(first)
            graph.erase_node(other)
        for mask in masks:
            mask.update_arg(0, first)
        count += len(masks)
    return count


def keep_outputs_of_masks(graph: Graph) -> int:
    """Put masks and 8-bit copies of tensors that have both into backward; return how many."""
    count = 0
    for copy in graph.find_nodes(op="call_function", target=kernels()["int8_round"].op):
        tensor = joint_graph.storage_of(copy.args[0])
        masks = [] if joint_graph.is_backward(tensor) else _masks(tensor)
        if not masks:
            continue
        for node in (copy, *masks):
            # Nodes with this tag are not moved into forward to save bytes.
            node.meta["partitioner_tag"] = "must_be_in_backward"
        count += len(masks)
    return count


def _masks(tensor: Node) -> list[Node]:
    """Return the comparisons of `tensor` with zero in backward, directly or through aliases."""
    masks: list[Node] = []
    for user in tensor.users:
        if user.target in _ALIASES:
            masks += _masks(user)
        elif user.target is aten.le.Scalar and user.args[1] == 0 and joint_graph.is_backward(user):
            masks.append(user)
    return masks
