"""Identities that decide whether something cached still fits: of our code, and of a graph."""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node


@cache
def source_digest() -> str:
    """Return a hash of every source file that can change what is compiled."""
    digest = hashlib.sha256(torch.__version__.encode())
    for package in ("graphpass", "codegen", "cost_model"):
        for path in sorted(_python_files(package)):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def graph_digest(gm: GraphModule, extra: Iterable[object]) -> str:
    """Return a hash of a Dynamo graph: operations, arguments, modules, inputs, autocast state.

    Args:
        gm: the graph that Dynamo handed to the backend.
        extra: whatever else decides the joint graph; hashed by its `repr`.
    """
    digest = hashlib.sha256(source_digest().encode())
    for module in gm.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                digest.update(_describe(node).encode())
    autocast = [
        (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
    ]
    digest.update(repr((autocast, *extra)).encode())
    return digest.hexdigest()


def _python_files(package: str) -> Sequence[Path]:
    try:
        root = Path(str(resources.files(package)))
    except ModuleNotFoundError:
        return ()
    return sorted(root.rglob("*.py"))


def _describe(node: Node) -> str:
    stack = [entry[0] for entry in (node.meta.get("nn_module_stack") or {}).values()]
    value = node.meta.get("example_value") if node.op == "placeholder" else None
    # Functions by name: their `repr` may hold an address, which is another one in every process.
    target = getattr(node.target, "__qualname__", None) or str(node.target)
    return repr((node.op, target, node.args, node.kwargs, stack, _describe_value(value)))


def _describe_value(value: Any) -> object:
    if isinstance(value, torch.Tensor):
        kind = type(value).__name__
        layout = tuple(value.stride()) if value.layout == torch.strided else str(value.layout)
        return (
            kind, tuple(value.shape), layout, value.dtype, str(value.device), value.requires_grad
        )  # fmt: skip
    return repr(value)
