"""Where backward takes the mask of a ReLU from.

Backward asks of a ReLU where its output is zero. The partitioner would keep the answer as a mask,
a byte an element, wherever nothing else needs the output. Two things are done about that:

* If a product reads the output rounded to bfloat16, the rounded copy answers as well, as rounding
  keeps every zero and makes none (but of subnormal numbers below 2^-134).
* Inductor's C++ code stores and reads masks element by element: a fused kernel that took 0.5 ms
  took 21 with a mask to store, and 7 with one to read (16 channels, 32x32, batch 128, one AVX-512
  core, torch 2.13). Bytes are stored and read as vectors, in 0.1 ms: on a CPU the mask becomes
  bytes. Whether they are kept, or made in backward from something that is kept anyway, is for the
  partitioner to say.
"""

import torch
from torch import Tensor
from torch.fx import Graph, Node

from graphpass import joint_graph
from graphpass.joint_graph import aten
from graphpass.splice import splice

_CONVERT = torch.ops.prims.convert_element_type.default
_SAME_ZEROS = (aten.alias.default, aten.detach.default, _CONVERT)


def settle_masks(graph: Graph) -> int:
    """Take masks from rounded copies where there are some, on a CPU as bytes; return how many."""
    copies, count = _rounded_copies(graph), 0
    for tensor, masks in _masks(graph).items():
        source = tensor
        if tensor in copies:
            source = copies[tensor][0]
            _share(tensor, copies[tensor])
        if joint_graph.value_of(tensor).device.type == "cpu":
            _keep_as_bytes(graph, source, masks)
        elif tensor in copies:
            for mask in masks:
                mask.update_arg(0, source)
        else:
            continue
        count += len(masks)
    return count


def _keep_as_bytes(graph: Graph, source: Node, masks: list[Node]) -> None:
    zeros = splice(graph, source.next, _zeros, [source])
    for mask in masks:
        again = splice(graph, mask, _to_mask, [zeros])
        # The partitioner's own word for what must not be computed ahead and kept.
        again.meta["partitioner_tag"] = "must_be_in_backward"
        mask.replace_all_uses_with(again)
        graph.erase_node(mask)


def _zeros(x: Tensor) -> Tensor:
    # Not from bool to uint8, which would be done element by element. NaN is not zero.
    return torch.where(x <= 0, 1.0, 0.0).to(torch.uint8)


def _to_mask(zeros: Tensor) -> Tensor:
    return zeros.to(torch.float32) > 0


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


def _masks(graph: Graph) -> dict[Node, list[Node]]:
    """Return the masks that backward takes of forward's tensors, directly or through copies."""
    masks: dict[Node, list[Node]] = {}
    for node in graph.find_nodes(op="call_function", target=aten.le.Scalar):
        tensor, bound = node.args
        if bound != 0 or not isinstance(tensor, Node) or not joint_graph.is_backward(node):
            continue
        while tensor.target in _SAME_ZEROS and isinstance(tensor.args[0], Node):
            tensor = tensor.args[0]
        if not joint_graph.is_backward(tensor):
            masks.setdefault(tensor, []).append(node)
    return masks
