"""The sparse weights that a model was trained with: to evaluate with them, and to take them along.

Training keeps all weights, and its forward products leave some of them out. `sparse_weights` lets
a model compute with what is left; `sparse_model` returns a copy that holds nothing else.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from graphpass.errors import ConfigError
from graphpass.keeping import Kept
from graphpass.products import Replacement
from graphpass.session import Session, session
from graphpass.site import Gradient
from graphpass.state import State, with_state


def leaves_weights_out(compiled_model: nn.Module) -> bool:
    """Return whether a forward product of the model uses some of its weights only.

    Args:
        compiled_model: as for `sparse_weights`.

    Raises:
        ConfigError: if it is no module.
    """
    return bool(_sparse_products(session(compiled_model)))


@contextmanager
def sparse_weights(compiled_model: nn.Module) -> Iterator[None]:
    """Let a model have the weights inside that its forward products use in training.

    The others are 0 inside, and are as they were afterwards.

    Args:
        compiled_model: what `torch.compile(model, backend="approx", ...)` returned, or the model;
            trained for a step at least.

    Raises:
        ConfigError: if it is no module, or no forward product of it leaves weights out.
    """
    sparse = _sparse(compiled_model)
    dense = [(weight, weight.detach().clone()) for weight, _ in sparse]
    try:
        _put(sparse)
        yield
    finally:
        _put(dense)


def sparse_model(compiled_model: nn.Module) -> nn.Module:
    """Return a copy of the model, not compiled, with 0 for the weights that are left out.

    Args:
        compiled_model: as for `sparse_weights`.

    Raises:
        ConfigError: if it is no module, or no forward product of it leaves weights out.
    """
    with sparse_weights(compiled_model):
        return copy.deepcopy(_uncompiled(compiled_model))


def _sparse(compiled_model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the weights of which some are left out, and what is used of them.

    Raises:
        ConfigError: if there are none.
    """
    now = session(compiled_model)
    model = _uncompiled(compiled_model)
    found = [
        _masked(model, now, replacement, part.of_site(replacement))
        for part, replacement in _sparse_products(now)
    ]
    if not found:
        raise ConfigError(
            "no forward product of this model leaves weights out; train it for a step with a "
            "method that does, such as options=graphpass.recipe('swat-u')"
        )
    return found


def _sparse_products(now: Session) -> list[tuple[Kept, Replacement]]:
    """Return the forward products that leave weights out, with what is kept for them."""
    return [
        (part, replacement)
        for part in now.parts
        for replacement in part.planned
        if replacement.method.weights is not None and replacement.site.gradient is Gradient.FORWARD
    ]


def _masked(
    model: nn.Module, now: Session, replacement: Replacement, kept: dict[str, Tensor]
) -> tuple[nn.Parameter, Tensor]:
    """Return the weight of a forward product, and what is used of it.

    Raises:
        ConfigError: if it is no parameter of the module.
    """
    site, method = replacement.site, replacement.method
    weight = getattr(model.get_submodule(site.path), "weight", None)
    turned = site.conv is None
    shape = tuple(reversed(site.shapes[1])) if turned else site.shapes[1]
    if not isinstance(weight, nn.Parameter) or tuple(weight.shape) != shape:
        raise ConfigError(
            f"the weight of {site.name!r} is no parameter 'weight' of that module, of shape "
            f"{list(shape)}; use nn.Linear and nn.Conv modules to evaluate with sparse weights"
        )
    with torch.no_grad():
        # Of the last step that began; on copies, as nothing is to change.
        step = torch.tensor(max(now.step - 1, 0), device=weight.device)
        copies = {name: tensor.clone() for name, tensor in kept.items()}
        state = State(step, copies, step) if copies else None
        operand = weight.to(getattr(torch, site.dtype))
        assert method.weights is not None
        used = with_state(method.weights, state)(
            site, replacement.params, operand.t() if turned else operand
        )
        used = used.t() if turned else used
        return weight, torch.where(used == 0, 0.0, weight)


def _put(weights: list[tuple[nn.Parameter, Tensor]]) -> None:
    with torch.no_grad():
        for weight, values in weights:
            weight.copy_(values)


def _uncompiled(compiled_model: nn.Module) -> nn.Module:
    model = getattr(compiled_model, "_orig_mod", compiled_model)
    assert isinstance(model, nn.Module)
    return model
