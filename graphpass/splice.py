"""Put a plain torch function into a graph, as the operations it consists of."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from graphpass import joint_graph
from graphpass.errors import RewriteError

# What Inductor reads of a node beyond its value: part, module, place in the user's source.
_KEPT_META = (
    "partitioner_tag",
    "fwd_nn_module_stack",
    "seq_nr",
    "stack_trace",
    "autograd_backward",
    "custom",
)


def splice(
    graph: Graph,
    anchor: Node,
    function: Callable[..., Tensor],
    args: Sequence[Node | int],
    like: Node | None = None,
) -> Node:
    """Insert the operations of `function(*args)` before `anchor`.

    Operations are decomposed as Inductor decomposes a traced model, so that they fuse with what
    stands around them. Sizes that are not constants must be passed as nodes (see `size_nodes`).

    Args:
        graph: the graph that holds `anchor`.
        anchor: node that the operations are put before.
        function: pure function of tensors and sizes that returns one tensor.
        args: nodes of the graph and integers.
        like: node whose metadata they inherit; the anchor, if none is given.

    Returns:
        The node of the result.

    Raises:
        RewriteError: if the function could not be traced into operations.
    """
    body = _trace(function, [_value(arg) for arg in args])
    placeholders = [node for node in body.nodes if node.op == "placeholder"]
    # A node of the body stands for a node of the graph, or, for an integer argument, for itself.
    copies: dict[Node, Any] = dict(zip(placeholders, args, strict=True))
    meta = (like or anchor).meta
    inherited = {key: meta[key] for key in _KEPT_META if key in meta}
    with graph.inserting_before(anchor):
        for node in body.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                result = copies[node.args[0]]
                assert isinstance(result, Node)
                return result
            assert node.op == "call_function", f"a constant was captured: {node.format_node()}"
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = {**inherited, "val": node.meta["val"]}
    raise RewriteError("a traced function has no output")


def size_nodes(graph: Graph, anchor: Node, tensor: Node) -> list[Node | int]:
    """Return the sizes of `tensor`: integers, and nodes for those that are not constants."""
    sizes: list[Node | int] = []
    for axis, size in enumerate(joint_graph.value_of(tensor).shape):
        if isinstance(size, int):
            sizes.append(size)
            continue
        with graph.inserting_before(anchor):
            node = graph.call_function(joint_graph.aten.sym_size.int, (tensor, axis))
        node.meta = {"val": size, "partitioner_tag": anchor.meta.get("partitioner_tag")}
        sizes.append(node)
    return sizes


def _value(arg: Node | int) -> Any:
    return arg.meta["val"] if isinstance(arg, Node) else arg


def _trace(function: Callable[..., Tensor], values: list[Any]) -> Graph:
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.functional_tensor import dispatch_functionalize

    fake_mode = detect_fake_mode(values)
    assert fake_mode is not None, "the values of a joint graph are fake tensors"
    # Functionalised, so that in-place operations and Triton kernels come out as pure nodes.
    trace = make_fx(dispatch_functionalize(function), decomposition_table=select_decomp_table())
    with fake_mode, torch.no_grad():
        body = trace(*values)
    body.graph.eliminate_dead_code()
    return body.graph
