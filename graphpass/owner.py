"""Whose graph is this? The model that the user compiled, and the names it has for its modules.

Dynamo tells a backend neither. Both are on the Python stack while a backend runs: the compiled
module that is being called, and the variables of the frame that is being traced.
"""

import sys
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch._dynamo.output_graph import OutputGraph
from torch._guards import CompileContext
from torch.fx import GraphModule

from graphpass import joint_graph
from graphpass.site import Site

# Looking at a frame's variables keeps what they hold until the frame ends, and the frame of a
# training loop holds a batch: only frames of these files of torch are looked at.
_FRAMES_OF_INTEREST = frozenset({"output_graph.py", "eval_frame.py", "module.py"})


@dataclass(frozen=True, slots=True)
class Owner:
    """The model that a traced frame belongs to, and the part of it that is run.

    Attributes:
        model: weak reference to the compiled model; None if a plain function was compiled and no
            single model could be told.
        frame: Dynamo's number of the traced code; recompilations of a frame share it.
        prefixes: path in the model of each variable of the frame that holds a module.
        parameter: path in the model of the first parameter that the graph gets; "" if unknown.
    """

    model: "weakref.ref[nn.Module] | None"
    frame: int
    prefixes: Mapping[str, str]
    parameter: str

    def identity(self, sites: Sequence[Site]) -> str:
        """Return what recompilations of the same code on the same modules share.

        Blocks of one class run the same code, and pieces of a graph that was split have one
        frame; they are told apart by their products.
        """
        return f"{self.frame} {sites[0].id if sites else self.parameter}"

    def path_of(self, traced: str) -> str:
        """Return the path that the user knows for a module path as Dynamo traced it."""
        variable, rest = joint_graph.split_root(traced)
        return ".".join(part for part in (self.prefixes.get(variable, ""), rest) if part)

    def the_model(self) -> nn.Module | None:
        """Return the model, if it is known and still exists."""
        return None if self.model is None else self.model()

    def product_modules(self) -> Collection[str] | None:
        """Return the paths of the modules that may hold products; None if no model is known.

        These are the modules with a parameter of at least two dimensions of their own.
        """
        model = self.the_model()
        if model is None:
            return None
        return [
            path
            for path, module in model.named_modules()
            if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
        ]


def find_owner(gm: GraphModule, parameter: torch.Tensor | None) -> Owner:
    """Return the owner of the graph that Dynamo is compiling right now.

    Args:
        gm: the graph that Dynamo handed to the backend.
        parameter: the first parameter among its example inputs.
    """
    scope = _traced_variables()
    roots = _root_variables(gm)
    modules = {name: scope[name] for name in roots if isinstance(scope.get(name), nn.Module)}
    model = compiled_model()
    trained = {id(m): m for m in modules.values() if any(True for _ in m.parameters())}
    if model is None and len(trained) == 1:
        (model,) = trained.values()
    compile_id = CompileContext.current_compile_id()
    frame = -1 if compile_id is None or compile_id.frame_id is None else compile_id.frame_id
    prefixes = {name: _path_within(model, module, name) for name, module in modules.items()}
    reference = None if model is None else weakref.ref(model)
    return Owner(reference, frame, prefixes, parameter_path(model, parameter))


def compiled_model() -> nn.Module | None:
    """Return the outermost compiled module that is being called right now, without its wrapper."""
    compiled: nn.Module | None = None
    for variables in _frames_of_interest():
        me = variables.get("self")
        if isinstance(me, OptimizedModule):
            compiled = me._orig_mod
        elif isinstance(me, nn.Module) and me._compiled_call_impl is not None:
            compiled = me
    return compiled


def parameter_path(model: nn.Module | None, parameter: torch.Tensor | None) -> str:
    """Return the path of a parameter in a model; "" if it is not one of it."""
    if model is not None and parameter is not None:
        for path, candidate in model.named_parameters():
            if candidate is parameter:
                return path
    return ""


def _frames_of_interest() -> Iterator[Mapping[str, Any]]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if PurePath(frame.f_code.co_filename).name in _FRAMES_OF_INTEREST:
            yield frame.f_locals
        frame = frame.f_back


def _traced_variables() -> Mapping[str, Any]:
    for variables in _frames_of_interest():
        me = variables.get("self")
        if isinstance(me, OutputGraph):
            return {**me.global_scope, **me.local_scope}
    return {}


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
