"""Whose graph is this? The model that the user compiled, and the names it has for its modules.

Dynamo tells a backend neither. Both are on the Python stack while a backend runs: the compiled
module that is being called, and the variables of the frame that is being traced.
"""

import sys
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule
from torch._dynamo.output_graph import OutputGraph
from torch._guards import CompileContext
from torch.fx import GraphModule

from graphpass import joint_graph


@dataclass(frozen=True, slots=True)
class Owner:
    """The model that a traced frame belongs to.

    Attributes:
        model: weak reference to the compiled model; None if a plain function was compiled and no
            single model could be told.
        frame: Dynamo's number of the traced code; recompilations of a frame share it.
        prefixes: path in the model of each variable of the frame that holds a module.
    """

    model: "weakref.ref[nn.Module] | None"
    frame: int
    prefixes: Mapping[str, str]

    @property
    def identity(self) -> str:
        """What recompilations of the same code on the same modules share.

        Blocks of one class run the same code; they are told apart by where they are in the model.
        """
        return f"{self.frame} {sorted(self.prefixes.items())}"

    def path_of(self, traced: str) -> str:
        """Return the path that the user knows for a module path as Dynamo traced it."""
        variable, rest = joint_graph.split_root(traced)
        return ".".join(part for part in (self.prefixes.get(variable, ""), rest) if part)

    def training(self) -> bool:
        """Return whether the model is in training mode now; True where no model is known."""
        model = self.model() if self.model is not None else None
        return model is None or model.training

    def product_modules(self) -> Collection[str] | None:
        """Return the paths of the modules that may hold products; None if no model is known.

        These are the modules with a parameter of at least two dimensions of their own.
        """
        model = self.model() if self.model is not None else None
        if model is None:
            return None
        return [
            path
            for path, module in model.named_modules()
            if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
        ]


def find_owner(gm: GraphModule) -> Owner:
    """Return the owner of the graph that Dynamo is compiling right now.

    Args:
        gm: the graph that Dynamo handed to the backend.
    """
    compiled, scope = _look_up_the_stack()
    roots = _root_variables(gm)
    modules = {name: scope[name] for name in roots if isinstance(scope.get(name), nn.Module)}
    model = compiled
    if model is None and len({id(module) for module in modules.values()}) == 1:
        model = next(iter(modules.values()))
    compile_id = CompileContext.current_compile_id()
    frame = -1 if compile_id is None or compile_id.frame_id is None else compile_id.frame_id
    prefixes = {name: _path_within(model, module, name) for name, module in modules.items()}
    return Owner(None if model is None else weakref.ref(model), frame, prefixes)


def _look_up_the_stack() -> tuple[nn.Module | None, Mapping[str, Any]]:
    """Return the outermost compiled module that is being called, and the traced variables."""
    compiled: nn.Module | None = None
    scope: Mapping[str, Any] = {}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        me = frame.f_locals.get("self")
        if isinstance(me, OutputGraph) and not scope:
            scope = {**me.global_scope, **me.local_scope}
        elif isinstance(me, OptimizedModule):
            compiled = me._orig_mod
        elif isinstance(me, nn.Module) and me._compiled_call_impl is not None:
            compiled = me
        frame = frame.f_back
    return compiled, scope


def _root_variables(gm: GraphModule) -> list[str]:
    """Return the names of the variables that the traced module paths start from."""
    stacks = (node.meta.get("nn_module_stack") or {} for node in gm.graph.nodes)
    paths = (entry[0] for stack in stacks for entry in stack.values())
    return sorted({joint_graph.split_root(path)[0] for path in paths})


def _path_within(model: nn.Module | None, module: nn.Module, variable: str) -> str:
    if model is None:
        return variable
    for path, candidate in model.named_modules():
        if candidate is module:
            return str(path)
    return variable
