"""Error feedback: what an approximate weight gradient dropped is added to the next step's.

With A(g, x) what a biased method makes of the operands, dw(g, x) the exact product, and e the
memory, which begins at 0:

    dw_hat = A(g, x) + e,      e' = dw(g, x) + e - dw_hat,

so that sum dw_hat = sum dw - e after any number of steps. The bias of single steps does not add up:
what is missing in the end is no more than what the last step dropped.

It is the memory of Seide et al. 2014, "1-bit stochastic gradient descent", and Stich et al. 2018,
"Sparsified SGD with memory", with A not applied to e: it chooses by g and x, and rows that it never
chooses (channels of `meprop`, `crs_unscaled` and `swat`) would pile up in e. Zhang et al. 2019,
"Memorized sparse backpropagation", keep the output gradients that meProp drops; of a batch those
belong to samples that the next batch does not have, so here the memory has the weight's shape.

It saves no time, and cannot. Where it comes from, a gradient is known and sending it is dear; here
computing it is. What was dropped is known once the exact product is computed too, which costs what
the approximation saved. It is for telling what bias costs from what a late gradient costs.

The memory is float32, or float64 with that, and holds what rounding of the result dropped as well.
What is not a finite number is forgotten. With a loss scaler it is in scaled units: as dropped.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from cost_model import KernelCost, element_count, elementwise
from graphpass.errors import ConfigError, Reason, Rejected
from graphpass.kernels_of import mover, product, vendor_kind
from graphpass.method import Method
from graphpass.pairs import exact, wide
from graphpass.site import Gradient, Site
from graphpass.state import Slot, State, with_state

_SLOT = "dropped"


def with_feedback(method: Method) -> Method:
    """Return a biased method that has error feedback where its parameter `feedback` is True.

    Args:
        method: its weight gradients are products of the first two operands that it names.
    """
    assert not method.unbiased and Gradient.WEIGHT in method.gradients, method.name

    def state(site: Site, params: Any) -> tuple[Slot, ...]:
        own = method.state(site, params)
        if not params.feedback:
            return own
        dtype = torch.promote_types(getattr(torch, site.dtype), torch.float32)
        return (*own, Slot(_SLOT, tuple(map(int, site.output)), dtype))

    def reject(site: Site, params: Any) -> Rejected | None:
        if params.feedback and site.gradient is not Gradient.WEIGHT:
            return Rejected(Reason.NO_FEEDBACK)
        return method.reject(site, params)

    def cost(site: Site, params: Any) -> tuple[KernelCost, ...]:
        own, count = method.cost(site, params), element_count(site.output)
        if not params.feedback:
            return own
        return (
            *own,
            # The exact product is computed as well, ...
            product(site, vendor_kind(site), site.cost),
            # ... and of both and the memory, the result and the next memory are made.
            mover("elementwise", elementwise(count, 3, 2, site.itemsize), site.dtype),
        )

    def reference(
        site: Site,
        params: Any,
        template: Tensor,
        draws: Tensor | None,
        *operands: Tensor,
        state: State | None = None,
    ) -> Tensor:
        own = with_state(method.reference, state if method.state(site, params) else None)
        result = own(site, params, template, draws, *operands)
        return _fed_back(site, template, result, operands, state) if params.feedback else result

    def lower(
        site: Site,
        params: Any,
        template: Tensor,
        seed: Tensor,
        salt: int,
        *operands: Tensor,
        state: State | None = None,
    ) -> Tensor:
        own = with_state(method.lower, state if method.state(site, params) else None)
        result = own(site, params, template, seed, salt, *operands)
        return _fed_back(site, template, result, operands, state) if params.feedback else result

    return dataclasses.replace(
        method, state=state, reject=reject, cost=cost, reference=reference, lower=lower
    )


def check_feedback(method: str, feedback: object) -> None:
    """Check the value of the parameter.

    Raises:
        ConfigError: if it is not True or False.
    """
    if not isinstance(feedback, bool):
        raise ConfigError(f"method {method!r}: feedback={feedback!r}; give True or False")


def _fed_back(
    site: Site,
    template: Tensor,
    approximate: Tensor,
    operands: tuple[Tensor, ...],
    state: State | None,
) -> Tensor:
    """Return the gradient with what was dropped before, and keep what is dropped now."""
    assert state is not None, site.id
    first, second = operands[:2]
    whole = (
        torch.matmul(first, second) if site.conv is None else exact(site, template, first, second)
    )
    before = state.before[_SLOT]
    result = (approximate.to(wide(approximate)) + before).to(template.dtype)
    after = before + whole - result
    return state.write(result, **{_SLOT: torch.where(after.isfinite(), after, 0.0)})
