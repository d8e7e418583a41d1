"""How tests compile when they are about graphs, not about what Inductor makes of them.

A backend in front of Inductor can change no more than the graphs and the inputs, and those are the
same in both ways here. With `pytest --inductor` both do nothing: all is compiled as users have it.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

# Whether Inductor is to compile everything.
in_full = False


def aten_only() -> AbstractContextManager[None]:
    """Let Inductor call ATen for every operation, instead of writing and compiling C++.

    Compiling takes a tenth of the time; buffers are planned, donated and reused as always. Nor are
    there copies to channels_last, which would be the only C++ that is left.
    """
    settings = {} if in_full else {"fallback_by_default": True, "layout_optimization": False}
    patch: AbstractContextManager[None] = torch._inductor.config.patch(settings)
    return patch


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Run the graphs that Inductor is given as they are; half the time of `aten_only` again.

    Nothing of this kind may reach a cache, where it would pass for what Inductor made.
    """
    if in_full:
        yield
        return
    with (
        pytest.MonkeyPatch.context() as patch,
        torch._inductor.config.patch(layout_optimization=False, fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        patch.setattr("torch._inductor.compile_fx.fx_codegen_and_compile", _as_it_is)
        yield


@dataclasses.dataclass
class _Interpreted:
    """Runs a graph, with what the callers of Inductor expect of its `OutputCode`.

    Not derived from it: importing Inductor takes two seconds, and some tests need none of it.
    """

    run: Callable[..., Any]
    _boxed_call: bool = True
    _fx_graph_cache_key: str | None = None
    _fx_graph_cache_debug_lines: list[str] | None = None

    def __call__(self, inputs: list[Any]) -> Any:
        arguments = list(inputs)
        # The caller gave them up, and the graph frees them after their last use.
        inputs.clear()
        return self.run(*arguments)

    def post_compile(self, *_: Any) -> None:
        """Inductor would look for what a CUDA graph needs."""

    def set_triton_bundle(self, _: Any) -> None:
        """There is no kernel to carry along."""


def _as_it_is(gm: GraphModule, example_inputs: Sequence[Any], *_: Any, **__: Any) -> _Interpreted:
    gm.recompile()
    return _Interpreted(gm.forward)
