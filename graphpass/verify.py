"""What must hold of a rewritten graph: the interface that the rest of the compiler relies on."""

from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from cost_model import Shape
from graphpass import joint_graph
from graphpass.errors import RewriteError


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """One result of a graph, as its consumers see it.

    Attributes:
        name: name of the node; None for a constant or a missing gradient.
        shape: sizes.
        strides: steps in elements, 0 where the size is 1 (there it has no meaning).
        dtype: element type.
    """

    name: str | None
    shape: Shape
    strides: Shape
    dtype: torch.dtype | None


def interface(graph: Graph) -> tuple[OutputSpec, ...]:
    """Return the specification of everything that `graph` returns."""
    return tuple(_spec(value) for value in joint_graph.output_values(graph))


def check(graph: Graph, before: tuple[OutputSpec, ...], planned: int, fired: int) -> None:
    """Check a rewritten graph against what it replaced.

    Args:
        graph: the rewritten graph.
        before: `interface` of the graph before it was rewritten.
        planned: number of sites that the plan approximates.
        fired: number of sites that were rewritten.

    Raises:
        RewriteError: if the graph is malformed, a result changed its name, shape, strides or
            dtype, or another number of sites was rewritten than planned.
    """
    if fired != planned:
        raise RewriteError(f"{fired} sites were rewritten, {planned} were planned")
    try:
        graph.lint()
    except (RuntimeError, ValueError, AssertionError) as error:
        raise RewriteError(f"the rewritten graph is malformed: {error}") from error
    after = interface(graph)
    if len(after) != len(before):
        raise RewriteError(f"the graph returns {len(after)} values instead of {len(before)}")
    for old, new in zip(before, after, strict=True):
        if old != new:
            raise RewriteError(f"a result changed: it was {old}, now it is {new}")


def _spec(value: object) -> OutputSpec:
    if not isinstance(value, Node):
        return OutputSpec(None, (), (), None)
    tensor = value.meta.get("val")
    if not isinstance(tensor, torch.Tensor):
        return OutputSpec(value.name, (), (), None)
    shape = joint_graph.dims_of(tensor.shape)
    strides = joint_graph.dims_of(tensor.stride())
    relevant = tuple(
        0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True)
    )
    return OutputSpec(value.name, shape, relevant, tensor.dtype)
