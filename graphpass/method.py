"""A method: how one product is approximated; and the registry of methods.

A method is one file in `graphpass/methods/`. Discovery is by folder: a new file is found, listed,
planned, reported and run through the contract tests without an edit anywhere else.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from cost_model import KernelCost
from graphpass.errors import ConfigError, Rejected
from graphpass.site import Gradient, Site
from graphpass.state import SiteState, Slot, no_state


@dataclass(frozen=True, slots=True)
class Sample:
    """A small problem on which the contract tests try a method.

    Attributes:
        x: shape of the layer's input: convolutions [B, Ci, ...], linear layers [M, K].
        module: builds the layer, such as `lambda: torch.nn.Conv2d(3, 8, 3)`.
        gradient: the product to approximate.
        params: parameters of the method.
        rejected: whether the method must reject this site.
        exact: whether the method must give the exact product here.
        computes_in: element type that operands or result are rounded to on the way; None for none.
    """

    x: tuple[int, ...]
    module: Callable[[], Any]
    gradient: Gradient
    params: Any
    rejected: bool = False
    exact: bool = False
    computes_in: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class Prior:
    """What a method is expected to do to the gradient before anything was measured.

    Figures are for the whole network: what it was seen to add when it computed this product of
    every layer (ResNet-20 on CIFAR-10).

    Attributes:
        tau: noise, relative to the noise of the gradient.
        bias: squared bias, relative to the squared gradient.
    """

    tau: float
    bias: float = 0.0


@dataclass(frozen=True, slots=True)
class Method:
    """How one product is approximated.

    The functions `draw`, `reference` and `lower` see the result's `template` (a tensor with the
    result's shape, dtype and device, and no values) and the operands that `operands` names:
    "grad", "input" and "weight" of a convolution, "left" and "right" factor of a matrix product.

    Attributes:
        name: key in the registry, name of the file, word in options and reports.
        summary: one line for listings.
        source: where the method comes from.
        unbiased: whether the expectation over the draws is the exact product.
        gradients: products it can approximate; the first is the default.
        params: frozen dataclass of parameters, range-checked with `ConfigError`.
        reject: says why a site must stay exact, or None.
        cost: every kernel of the approximate product, a term of its own.
        operands: names of the operands that it reads.
        draw: all its random numbers, from a seed and a salt; None for a method without any.
        reference: (site, params, template, draws, *operands) -> result; plain and obvious.
        lower: (site, params, template, seed, salt, *operands) -> result; traced into the graph.
        samples: small problems for the contract tests.
        noise: (site, params, *operands) -> 0-d tensor, the predicted E|approximate - exact|^2,
            summed over the result; None where no formula is known.
        density: (site, params, *operands) -> 0-d tensor, the expected share of the output gradient
            that is left; None for a method that drops no single values.
        ladder: the parameters worth considering for a site; None for the default ones alone.
        prior: (site, params) -> what it is expected to add; None, or None returned, where nothing
            is known, and then the planner chooses it only once its noise was measured.
        kernels: names of the kernels that compute it on a GPU, where a CPU has the vendor's.
        state: (site, params) -> what is kept of the site from step to step; `reference` and `lower`
            get a `State` as `state=` where that is anything.
        settle: (step, all sites that have state) changes it in place before the first call of every
            step; for what is decided over layers. No part of a compiled graph.
        weights: (site, params, second operand, state=) -> that operand of a forward product as it
            is used; None for a method that leaves no weights out.
        fast_on_cpu: whether its weight gradient, or else what it can do, takes less time than the
            vendor's exact one in most layers that were measured (`benchmarks/layers.py`; by what it
            saves of a step where that does not apply); None where that was not measured.
        fast_on_gpu: the same of a GPU.
    """

    name: str
    summary: str
    source: str
    unbiased: bool
    gradients: tuple[Gradient, ...]
    params: type[Any]
    reject: Callable[[Site, Any], Rejected | None]
    cost: Callable[[Site, Any], tuple[KernelCost, ...]]
    operands: Callable[[Site, Any], tuple[str, ...]]
    draw: Callable[[Site, Any, Tensor, Tensor, int], Tensor | None]
    reference: Callable[..., Tensor]
    lower: Callable[..., Tensor]
    samples: Callable[[], tuple[Sample, ...]]
    noise: Callable[..., Tensor] | None = None
    density: Callable[..., Tensor] | None = None
    ladder: Callable[[Site], tuple[Any, ...]] | None = None
    prior: Callable[[Site, Any], Prior | None] | None = None
    kernels: tuple[str, ...] = ()
    state: Callable[[Site, Any], tuple[Slot, ...]] = no_state
    settle: Callable[[int, Sequence[SiteState]], None] | None = None
    weights: Callable[..., Tensor] | None = None
    fast_on_cpu: bool | None = None
    fast_on_gpu: bool | None = None

    def make_params(self, given: dict[str, Any]) -> Any:
        """Return the parameter record.

        Raises:
            ConfigError: if a parameter is unknown or out of range.
        """
        legal = [field.name for field in fields(self.params)]
        unknown = sorted(set(given) - set(legal), key=repr)
        if unknown:
            raise ConfigError(
                f"method {self.name!r} has no parameter {', '.join(map(repr, unknown))}: legal are "
                f"{', '.join(legal) or 'none'}, and 'gradient'"
            )
        return self.params(**given)


_REGISTRY: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method to the registry.

    Raises:
        ValueError: if the name is taken.
    """
    if method.name in _REGISTRY:
        raise ValueError(f"two methods are called {method.name!r}")
    _REGISTRY[method.name] = method
    return method


@cache
def methods() -> MappingProxyType[str, Method]:
    """Return every method by name, in alphabetical order."""
    import graphpass.methods  # noqa: F401  (importing the folder registers its files)

    return MappingProxyType(dict(sorted(_REGISTRY.items())))


def get_method(name: object) -> Method:
    """Return the method called `name`.

    Raises:
        ConfigError: if there is none.
    """
    if not isinstance(name, str) or name not in methods():
        raise ConfigError(f"unknown method {name!r}: legal are {', '.join(methods())}")
    return methods()[name]


def no_draw(*_: object) -> None:
    """Draw nothing: the `draw` of a method that is deterministic."""


def salt_of(site: Site) -> int:
    """Return the number that tells apart the draws of two sites: a hash of the site's name."""
    return zlib.crc32(site.id.encode()) & 0x3FFFFFFF
