"""Where the state of methods lives between steps: tensors of a session, by site and method.

State belongs to a site, a method and its parameters. It starts anew where one of them changes, and
is dropped where a product becomes exact for good, or is computed by another method: what was kept
for one approximation means nothing to another. Steps that a schedule leaves out do not touch it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from graphpass.errors import ConfigError
from graphpass.method import Method
from graphpass.products import Replacement
from graphpass.state import SiteState, Slot


def slots_of(replacements: Iterable[Replacement]) -> dict[str, Slot]:
    """Return the slots of some products by their keys, in order."""
    return {
        key_of(replacement, slot): slot
        for replacement in replacements
        for slot in replacement.method.state(replacement.site, replacement.params)
    }


def key_of(replacement: Replacement, slot: Slot) -> str:
    """Return what names a tensor in a session, for people too."""
    params = json.dumps(asdict(replacement.params), sort_keys=True)
    return f"{replacement.site.id} {replacement.method.name} {params} {slot.name}"


def settle(parts: Iterable["Kept"], step: int) -> None:
    """Let methods decide what concerns several layers, before the first call of a step.

    Args:
        parts: what is kept of all parts of a model.
        step: the step that begins.
    """
    found: dict[str, tuple[Method, list[SiteState]]] = {}
    for part in parts:
        for method, state in part.settled:
            found.setdefault(method.name, (method, []))[1].append(state)
    for method, states in found.values():
        assert method.settle is not None
        method.settle(step, states)


class Kept:
    """The tensors of one part of a model.

    Attributes:
        planned: what is approximated in it.
        settled: the state of sites whose methods have something to settle between steps.
    """

    def __init__(self, saved: Mapping[str, Tensor]) -> None:
        """Keep nothing yet.

        Args:
            saved: what another run kept; used once there is a place for it.
        """
        self.planned: tuple[Replacement, ...] = ()
        self.settled: list[tuple[Method, SiteState]] = []
        self._slots: dict[str, Slot] = {}
        self._tensors: dict[str, Tensor] = {}
        self._saved = saved
        self._device = torch.device("cpu")

    def adopt(self, replacements: Iterable[Replacement], device: torch.device) -> None:
        """Make room for the state of what is planned now; drop the rest."""
        self.planned, self._device = tuple(replacements), device
        before, self._slots = self._slots, slots_of(self.planned)
        self._tensors = {
            key: self._tensors[key] if before.get(key) == slot else slot.fresh(device)
            for key, slot in self._slots.items()
        }
        self.settled = [
            (replacement.method, SiteState(replacement.site, replacement.params, kept))
            for replacement in self.planned
            if replacement.method.settle is not None and (kept := self.of_site(replacement))
        ]
        if self._saved:
            self.load_state_dict(self._saved)

    def of(self, replacements: Iterable[Replacement]) -> tuple[Tensor, ...]:
        """Return the tensors of some products, in the order of `slots_of`.

        The model may have been compiled again with other options, and run as it was before.
        """
        for key, slot in (slots := slots_of(replacements)).items():
            if key not in self._slots:
                self._slots[key], self._tensors[key] = slot, slot.fresh(self._device)
        return tuple(self._tensors[key] for key in slots)

    def of_site(self, replacement: Replacement) -> dict[str, Tensor]:
        """Return the tensors of one product by the names of their slots."""
        slots = replacement.method.state(replacement.site, replacement.params)
        return {slot.name: self._tensors[key_of(replacement, slot)] for slot in slots}

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of all tensors."""
        return {key: tensor.clone() for key, tensor in self._tensors.items()}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from what was saved; what it does not have starts anew.

        Raises:
            ConfigError: if a tensor has another shape.
        """
        self._saved = {}
        for key, slot in self._slots.items():
            value: Any = saved.get(key, slot.initial)
            if isinstance(value, Tensor) and tuple(value.shape) != slot.shape:
                raise ConfigError(
                    f"the session state has {key} of shape {list(value.shape)}, this model keeps "
                    f"{list(slot.shape)}; load what was saved for the same model and options"
                )
            tensor = self._tensors[key]
            tensor.copy_(value) if isinstance(value, Tensor) else tensor.fill_(value)
