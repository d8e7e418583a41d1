"""A compiled graph whose variants a benchmark runs by hand: exact, a plan, or a probe."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from codegen import notes
from graphpass import backend
from graphpass.callers import first_parameter, parameter_names
from graphpass.capture import Analysis
from graphpass.dispatcher import Choice, Dispatcher
from graphpass.measuring import Names
from graphpass.method import get_method
from graphpass.owner import find_owner
from graphpass.products import Replacement
from graphpass.sheet import Probe, Reading, Subject
from graphpass.site import Gradient
from graphpass.steering import names_of
from graphpass.variants import EXACT, Active, Variants

Specs = Sequence[Mapping[str, Any]]


class Laboratory:
    """A backend for `torch.compile` that runs what it is told.

    Attributes:
        running: the sites that the next calls approximate, or a probe.
        analysis: what the graph holds, once it was compiled.
        variants: its variants.
        calls: number of calls so far: the seed of the draws.
    """

    def __init__(self) -> None:
        """Run exactly until told otherwise."""
        self.running: Active | Probe = EXACT
        self.analysis = Analysis(())
        self.variants: Variants
        self.parameters: dict[int, Tensor] = {}
        self._device = torch.device("cpu")
        self._page: Tensor | None = None
        self.calls = 0
        self._names: dict[int, str] = {}

    def __call__(self, gm: GraphModule, inputs: Sequence[Any]) -> Dispatcher:
        """Compile the graph of a model."""
        first = first_parameter(inputs)
        assert first is not None
        owner = find_owner(gm, inputs[first])
        _, analysis = backend.analyse(gm, inputs, owner, {})
        assert analysis is not None
        self.analysis = analysis
        self.variants = Variants(gm, {}, backend.parameters_of(inputs))
        weights = tuple(site for site in analysis.sites if site.gradient is Gradient.WEIGHT)
        positions = tuple(sorted(self.variants.parameters))
        self.variants.subject = Subject(weights, positions)
        self.parameters = {position: inputs[position] for position in positions}
        self._names = parameter_names(owner.the_model(), inputs, positions)
        self._device = inputs[first].device
        return Dispatcher(
            self.variants,
            self._choose,
            lambda: None,
            lambda *_: None,
            self._device,
            99,
            False,
            True,
        )

    def numbers(self, specs: Specs, paths: Sequence[str]) -> Active:
        """Return the replacements that methods make at all sites of some modules.

        Args:
            specs: methods as in the option `methods`.
            paths: paths of the modules.
        """
        found = set()
        for given in specs:
            spec = dict(given)
            method, wanted = get_method(spec.pop("name")), Gradient(spec.pop("gradient"))
            params = method.make_params(spec)
            for site in self.analysis.sites:
                if site.path in paths and site.gradient is wanted and not site.reason:
                    replacement = Replacement(site, method, params)
                    if method.reject(site, params) is None:
                        found.add(self.variants.position(replacement))
        return frozenset(found)

    def reading(self) -> Reading:
        """Return what the last probe found."""
        assert isinstance(self.running, Probe) and self._page is not None
        reading = self.variants.sheet(self.running).read(self._page.tolist())
        assert reading is not None, "no backward pass was run"
        return reading

    def names(self) -> Names:
        """Return what everything is called."""
        candidates = dict(enumerate(self.variants.replacements))
        return names_of(self.analysis, candidates, self._names)

    def _choose(self, args: Sequence[Any]) -> Choice:
        del args
        self.calls += 1
        self._page = None
        if isinstance(self.running, Probe):
            self._page = notes.fresh(self.variants.sheet(self.running).size, self._device)
        return Choice(self.running, self.calls, self._page)
