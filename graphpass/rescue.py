"""What fails while a user trains, and is ours: training goes on without it.

Most of it is answered by an exact graph, or by a plan that stays as it is. The backward part of a
graph is another matter: it is compiled when it first runs, which is in the user's `backward()`, and
then the forward part has run. So where that fails it runs as it is, operation by operation, and
gives the gradients that it would have given. Only where it draws the forward part's random numbers
again it cannot: Inductor alone draws the same ones from the same seed.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor import inductor_prims  # noqa: F401  (defines the operators of `_draws`)
from torch._inductor.compile_fx import compile_fx_inner
from torch.fx import GraphModule

from graphpass.errors import ConfigError

_Result = TypeVar("_Result")


def rescued(
    work: Callable[[], _Result], otherwise: Callable[[str], _Result], strict: bool
) -> _Result:
    """Return what some work returns; where it fails, what another function returns.

    Args:
        work: what may fail.
        otherwise: is given what failed.
        strict: whether a failure is raised instead.

    Raises:
        ConfigError: if the work failed by a mistake of the user.
        Exception: what the work raised, where that is asked for.
    """
    try:
        return work()
    except ConfigError:
        raise
    except Exception as error:
        if strict:
            raise
        return otherwise(f"an internal failure ({type(error).__name__}: {error})")


def or_interpreted(failed: Callable[[Exception], None]) -> Callable[..., Any]:
    """Return what stands in for Inductor's compiler of the parts of a graph.

    Args:
        failed: called with what Inductor raised over a backward part; may raise it.
    """

    def compile_part(gm: GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
        if not settings.get("is_backward"):
            return compile_fx_inner(gm, inputs, **settings)
        # Passes that come before a failure leave the graph changed.
        spare = copy.deepcopy(gm)
        try:
            return compile_fx_inner(gm, inputs, **settings)
        except Exception as error:
            if _draws(spare):
                raise
            failed(error)
            return make_boxed_func(spare.forward)

    return compile_part


def _draws(gm: GraphModule) -> bool:
    """Return whether a graph draws numbers from a seed that Inductor took."""
    prims = torch.ops.prims
    ours = (prims.inductor_random.default, prims.inductor_randint.default)
    return any(gm.graph.find_nodes(op="call_function", target=target) for target in ours)
