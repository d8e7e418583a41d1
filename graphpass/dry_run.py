"""Plan a model without training it: no weight, buffer or random state changes, nothing is run."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.pgo import get_code_state
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.fx import GraphModule

from graphpass.backend import analyse, inductor_patches, make_visible
from graphpass.callers import first_parameter
from graphpass.capture import Analysis
from graphpass.errors import ConfigError
from graphpass.options import Options
from graphpass.owner import find_owner
from graphpass.plan import Plan
from graphpass.planner import make_plan
from graphpass.session import Session


def plan(
    model: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] | None = None, **options: Any
) -> Plan:
    """Return the plan that training `model` with these options would follow.

    Its prediction says what it is expected to gain and to cost, before anything was measured.

    Args:
        model: the model, not compiled; planned in training mode, left as it is.
        inputs: what the model is called with; tensors (real or fake) and anything else.
        loss: maps the model's output to the value that is differentiated, where its products are
            to be planned as well.
        options: fields of `Options`.

    Raises:
        ConfigError: if an option is not legal, the budget cannot be met, or the model trains
            nothing.
    """
    return _planned(model, inputs, loss, Options.from_dict(options)).session.plan


def analyses(
    model: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] | None = None
) -> tuple[Analysis, ...]:
    """Return what every training graph of `model` holds, as `plan` sees it.

    Raises:
        ConfigError: as `plan` does.
    """
    # Exact: nothing is to be priced, nor timed.
    return tuple(_planned(model, inputs, loss, Options(budget=0)).analyses)


def _planned(
    model: nn.Module,
    inputs: Sequence[Any],
    loss: Callable[[Any], Tensor] | None,
    options: Options,
) -> "_Planning":
    if not isinstance(model, nn.Module) or hasattr(model, "_orig_mod"):
        raise ConfigError(f"plan: give the model itself, not compiled; got {type(model).__name__}")
    mode = detect_fake_mode(inputs) or FakeTensorMode()
    with FakeCopyMode(mode):
        stand_in = copy.deepcopy(model).train()
    planned = _Planning(options)
    # Compilations of the user's own model are left alone: only this copy's frames are new.
    compiled = torch.compile(stand_in, backend=planned, dynamic=False)
    fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in inputs]
    with mode, torch.enable_grad(), torch.random.fork_rng(devices=()), _sizes_forgotten():
        output = compiled(*fakes)
        if loss is not None:
            torch.compile(loss, backend=planned, dynamic=False)(output)
    if not planned.session.plan.decisions:
        raise ConfigError(
            "plan: no convolution or matrix product of the model is trained with these inputs; "
            "check that parameters have requires_grad and the inputs are those of training"
        )
    return planned


@contextmanager
def _sizes_forgotten() -> Iterator[None]:
    """Keep Dynamo from learning the sizes of the inputs.

    It compares the sizes of every call of a function, whichever copy of a model it belongs to, and
    compiles with symbolic ones where two differ: planning with another batch size than that of
    training would make training dynamic.
    """
    state = get_code_state()
    before = copy.deepcopy(dict(state))
    try:
        yield
    finally:
        state.clear()
        state.update(before)


class _Planning:
    """A backend that plans every graph it is handed, and runs it as it is (on fake tensors)."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.session = Session()
        self.analyses: list[Analysis] = []

    def __call__(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        first = first_parameter(inputs)
        owner = find_owner(gm, None if first is None else inputs[first])
        with make_visible():
            patches = inductor_patches(self.options)
            _, analysis = analyse(gm, inputs, owner, patches)
            if analysis is not None:
                self.analyses.append(analysis)
                identity = owner.identity(analysis.sites)
                offset = self.session.layer_offset(identity, analysis.layers)
                made = make_plan(analysis, self.options, offset, owner.product_modules())
                self.session.add_plan(identity, made)
        forward: Callable[..., Any] = gm.forward
        return forward
